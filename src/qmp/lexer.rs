//! Bytes to tokens, as QEMU's `qobject/json-lexer.c` cuts them, one byte at a time.
//!
//! Differs from RFC 8259 on purpose: strings may be single-quoted and may escape a single quote.

/// What a token is.
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
    /// Digits, perhaps with a sign.
    Integer,
    /// A number with a fraction or an exponent.
    Float,
    /// Lower-case letters.
    Keyword,
    /// A string with its quotes.
    String,
    /// Bytes that no token begins with, or that end one too early. The lexer skips what follows, up to a byte that promises a new start.
    Stray,
    /// The beginning of a token that grew beyond the limit.
    TooLong,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    #[default]
    Start,
    /// Behind stray bytes.
    Recovery,
    InString(u8),
    InEscape(u8),
    Sign,
    Zero,
    Digits,
    /// Behind the decimal point.
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// What a byte does in a state.
enum Step {
    /// It belongs to the token that is being read.
    Grow(State),
    /// It is the last one of the token.
    End(Kind),
    /// It belongs to no token.
    Skip(State),
    /// The token ended before it; look at it again.
    EndBefore(Kind),
    /// Look at it again, from the start.
    Again,
}

/// The lexer. A token that is being read takes at most `limit` + 1 bytes.
#[derive(Debug, Default)]
pub(super) struct Lexer {
    state: State,
    text: Vec<u8>,
    /// The token that is being read was too long: the rest of it is read and forgotten, so that what follows is understood. (QEMU begins a new
    /// token in the middle, and takes the end of a long string for the begin of another.)
    discarding: bool,
}

/// A whole token: its kind and its bytes.
pub(super) type Token = (Kind, Vec<u8>);

impl Lexer {
    /// Reads from `input`, and takes from it what was read, up to the end of the next token of at most `limit` bytes. `None` when the input is used up.
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
                    self.state = State::Start;
                    (None, false)
                }
            };
            if consumed {
                *input = &input[1..];
            }
            if let Some(kind) = ended {
                self.state = if kind == Kind::Stray { State::Recovery } else { State::Start };
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

    /// Bytes of the token that is being read.
    #[cfg(any(test, fuzzing))]
    pub fn held(&self) -> usize {
        self.text.len()
    }
}

fn step(state: State, byte: u8) -> Step {
    use Step::{Again, End, EndBefore, Grow, Skip};
    match (state, byte) {
        (State::Start, b' ' | b'\t' | b'\r' | b'\n') => Skip(State::Start),
        (State::Start, b'{') => End(Kind::LeftCurly),
        (State::Start, b'}') => End(Kind::RightCurly),
        (State::Start, b'[') => End(Kind::LeftSquare),
        (State::Start, b']') => End(Kind::RightSquare),
        (State::Start, b',') => End(Kind::Comma),
        (State::Start, b':') => End(Kind::Colon),
        (State::Start, b'"' | b'\'') => Grow(State::InString(byte)),
        (State::Start, b'-') => Grow(State::Sign),
        (State::Start | State::Sign, b'0') => Grow(State::Zero),
        (State::Start | State::Sign | State::Digits, b'1'..=b'9') | (State::Digits, b'0') => Grow(State::Digits),
        (State::Start | State::Keyword, b'a'..=b'z') => Grow(State::Keyword),
        (State::Keyword, _) => EndBefore(Kind::Keyword),

        // Line ends and structure are promising; a client uses the other control bytes and 0xFE, 0xFF to force a clean state.
        (State::Recovery, b'\t') => Skip(State::Recovery),
        (State::Recovery, 0..0x20 | 0xfe | 0xff | b'{' | b'}' | b'[' | b']' | b':' | b',') => Again,
        (State::Recovery, _) => Skip(State::Recovery),

        (State::InString(quote), _) if byte == quote => End(Kind::String),
        (State::InString(quote), b'\\') => Grow(State::InEscape(quote)),
        (State::InString(quote) | State::InEscape(quote), 0x20..=0xfd) => Grow(State::InString(quote)),

        (State::Zero | State::Digits, b'.') => Grow(State::Point),
        (State::Digits | State::Fraction, b'e' | b'E') => Grow(State::Exponent),
        (State::Zero, b'0'..=b'9') => End(Kind::Stray),
        (State::Zero | State::Digits, _) => EndBefore(Kind::Integer),
        (State::Point | State::Fraction, b'0'..=b'9') => Grow(State::Fraction),
        (State::Exponent, b'+' | b'-') => Grow(State::ExponentSign),
        (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => Grow(State::ExponentDigits),
        (State::Fraction | State::ExponentDigits, _) => EndBefore(Kind::Float),

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
        assert_eq!(tokens(b"01 2]").iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [Kind::Stray, Kind::RightSquare]);
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
        // A control character ends it too.
        let mut long = vec![b'"'];
        long.extend([b'a'; 250]);
        long.extend(b"\x01 ] 1 ");
        let kinds: Vec<_> = tokens(&long).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [Kind::TooLong, Kind::RightSquare, Kind::Integer]);
    }
}
