//! Bytes to tokens, one byte at a time, as in QEMU's `qobject/json-lexer.c`.
//!
//! Differs from RFC 8259 as QEMU's lexer does: strings may have single quotes, and may escape a
//! single quote.

/// Kind of a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// `{`
    LeftCurly,
    /// `}`
    RightCurly,
    /// `[`
    LeftSquare,
    /// `]`
    RightSquare,
    /// `,`
    Comma,
    /// `:`
    Colon,
    /// Digits with an optional sign.
    Integer,
    /// A number with a fraction or an exponent.
    Float,
    /// Lower-case letters.
    Keyword,
    /// A string with its quotes.
    String,
    /// Bytes with which no token begins, or which end a token too early. The lexer then skips input
    /// up to a byte at which a token may start.
    Stray,
    /// The first bytes of a token that is longer than the limit.
    TooLong,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum LexerState {
    #[default]
    Start,
    /// After stray bytes.
    Recovery,
    InString(u8),
    InEscape(u8),
    Sign,
    Zero,
    Digits,
    /// After the decimal point.
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// Effect of a byte in a state.
enum Step {
    /// The byte belongs to the current token.
    Grow(LexerState),
    /// The byte is the last one of the current token.
    End(Kind),
    /// The byte belongs to no token.
    Skip(LexerState),
    /// The token ends before this byte, which is looked at again.
    EndBefore(Kind),
    /// The byte is looked at again in the start state.
    Again,
}

/// The lexer. The current token takes at most `limit` + 1 bytes.
#[derive(Debug, Default)]
pub(super) struct Lexer {
    state: LexerState,
    text: Vec<u8>,
    /// The current token was too long. The rest of it is read and dropped, so that the input after
    /// it is understood. (QEMU begins a new token in the middle, and takes the end of a long string
    /// for the start of another.)
    discarding: bool,
}

/// A complete token: its kind and its bytes.
pub(super) type Token = (Kind, Vec<u8>);

impl Lexer {
    /// Reads `input` up to the end of the next token of at most `limit` bytes, and advances `input`
    /// past it. Returns `None` when the input is used up.
    pub fn next(&mut self, input: &mut &[u8], limit: usize) -> Option<Token> {
        while let Some(&byte) = input.first() {
            let (ended, consumed) = match step(self.state, byte) {
                Step::Grow(state) => {
                    self.keep(byte);
                    self.state = state;
                    (None, true)
                }
                Step::End(kind) => {
                    self.keep(byte);
                    (Some(kind), true)
                }
                Step::EndBefore(kind) => (Some(kind), false),
                Step::Skip(state) => {
                    self.state = state;
                    (None, true)
                }
                Step::Again => {
                    self.state = LexerState::Start;
                    (None, false)
                }
            };
            if consumed {
                *input = &input[1..];
            }
            if let Some(kind) = ended {
                self.state =
                    if kind == Kind::Stray { LexerState::Recovery } else { LexerState::Start };
                if std::mem::take(&mut self.discarding) {
                    continue;
                }
            }
            let too_long = self.text.len() > limit;
            if too_long || ended.is_some() {
                self.discarding = ended.is_none();
                let kind = if too_long { Kind::TooLong } else { ended? };
                return Some((kind, std::mem::take(&mut self.text)));
            }
        }
        None
    }

    fn keep(&mut self, byte: u8) {
        if !self.discarding {
            self.text.push(byte);
        }
    }

    /// Returns the bytes of the current token.
    #[cfg(any(test, feature = "testing"))]
    pub fn held(&self) -> usize {
        self.text.len()
    }
}

fn step(state: LexerState, byte: u8) -> Step {
    use Step::{Again, End, EndBefore, Grow, Skip};
    match (state, byte) {
        (LexerState::Start, b' ' | b'\t' | b'\r' | b'\n') => Skip(LexerState::Start),
        (LexerState::Start, b'{') => End(Kind::LeftCurly),
        (LexerState::Start, b'}') => End(Kind::RightCurly),
        (LexerState::Start, b'[') => End(Kind::LeftSquare),
        (LexerState::Start, b']') => End(Kind::RightSquare),
        (LexerState::Start, b',') => End(Kind::Comma),
        (LexerState::Start, b':') => End(Kind::Colon),
        (LexerState::Start, b'"' | b'\'') => Grow(LexerState::InString(byte)),
        (LexerState::Start, b'-') => Grow(LexerState::Sign),
        (LexerState::Start | LexerState::Sign, b'0') => Grow(LexerState::Zero),
        (LexerState::Start | LexerState::Sign | LexerState::Digits, b'1'..=b'9')
        | (LexerState::Digits, b'0') => Grow(LexerState::Digits),
        (LexerState::Start | LexerState::Keyword, b'a'..=b'z') => Grow(LexerState::Keyword),
        (LexerState::Keyword, _) => EndBefore(Kind::Keyword),

        // A token may start at line ends and at structural characters. Clients use the other
        // control bytes, 0xFE and 0xFF to force a clean state.
        (LexerState::Recovery, b'\t') => Skip(LexerState::Recovery),
        (LexerState::Recovery, 0..0x20 | 0xfe | 0xff | b'{' | b'}' | b'[' | b']' | b':' | b',') => {
            Again
        }
        (LexerState::Recovery, _) => Skip(LexerState::Recovery),

        (LexerState::InString(quote), _) if byte == quote => End(Kind::String),
        (LexerState::InString(quote), b'\\') => Grow(LexerState::InEscape(quote)),
        (LexerState::InString(quote) | LexerState::InEscape(quote), 0x20..=0xfd) => {
            Grow(LexerState::InString(quote))
        }

        (LexerState::Zero | LexerState::Digits, b'.') => Grow(LexerState::Point),
        (LexerState::Digits | LexerState::Fraction, b'e' | b'E') => Grow(LexerState::Exponent),
        (LexerState::Zero, b'0'..=b'9') => End(Kind::Stray),
        (LexerState::Zero | LexerState::Digits, _) => EndBefore(Kind::Integer),
        (LexerState::Point | LexerState::Fraction, b'0'..=b'9') => Grow(LexerState::Fraction),
        (LexerState::Exponent, b'+' | b'-') => Grow(LexerState::ExponentSign),
        (
            LexerState::Exponent | LexerState::ExponentSign | LexerState::ExponentDigits,
            b'0'..=b'9',
        ) => Grow(LexerState::ExponentDigits),
        (LexerState::Fraction | LexerState::ExponentDigits, _) => EndBefore(Kind::Float),

        _ => End(Kind::Stray),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(input: &[u8]) -> Vec<(Kind, String)> {
        let (mut lexer, mut rest, mut found) = (Lexer::default(), input, Vec::new());
        while let Some((kind, text)) = lexer.next(&mut rest, 100) {
            found.push((kind, String::from_utf8_lossy(&text).into_owned()));
        }
        found
    }

    #[test]
    fn every_kind_of_token() {
        let found = tokens(br#"{'a\'"' : [-0,1.5e+3 ,"\"'",true]} "#);
        let expected = [
            (Kind::LeftCurly, "{"),
            (Kind::String, r#"'a\'"'"#),
            (Kind::Colon, ":"),
            (Kind::LeftSquare, "["),
            (Kind::Integer, "-0"),
            (Kind::Comma, ","),
            (Kind::Float, "1.5e+3"),
            (Kind::Comma, ","),
            (Kind::String, r#""\"'""#),
            (Kind::Comma, ","),
            (Kind::Keyword, "true"),
            (Kind::RightSquare, "]"),
            (Kind::RightCurly, "}"),
        ];
        assert_eq!(found, expected.map(|(kind, text)| (kind, text.to_string())));
    }

    #[test]
    fn stray_bytes_are_skipped_to_the_next_promising_byte() {
        assert_eq!(tokens(b"@@@ 1\t2 [").last().unwrap().0, Kind::LeftSquare);
        assert_eq!(tokens(b"@@@ 1\t2 [").len(), 2);
        assert_eq!(
            tokens(b"01 2]").iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
            [Kind::Stray, Kind::RightSquare]
        );
        assert_eq!(tokens(b"\"a\n1 "), [(Kind::Stray, "\"a\n".into()),]);
        assert_eq!(tokens(b"\xff\xff").len(), 2);
        assert_eq!(tokens(b"-x").len(), 1);
        assert_eq!(tokens(b"1.]").len(), 1, "the byte that does not fit is part of what is stray");
    }

    #[test]
    fn the_rest_of_a_token_that_is_too_long_is_forgotten() {
        let found = tokens(&[b'a'; 250]);
        assert_eq!(found.len(), 1);
        assert!(found[0].0 == Kind::TooLong && found[0].1.len() == 101);
        let mut long = vec![b'"'];
        long.extend([b'a'; 250]);
        long.extend(b"\"] 1 ");
        let kinds: Vec<_> = tokens(&long).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [Kind::TooLong, Kind::RightSquare, Kind::Integer]);
        // A control character also ends the token that is too long.
        let mut long = vec![b'"'];
        long.extend([b'a'; 250]);
        long.extend(b"\x01 ] 1 ");
        let kinds: Vec<_> = tokens(&long).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [Kind::TooLong, Kind::RightSquare, Kind::Integer]);
    }
}
