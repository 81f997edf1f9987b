//! Characters as QEMU's `util/unicode.c` reads them: "modified" UTF-8, in which U+0000 takes two
//! bytes, without the noncharacters of Unicode.

/// Decodes the start of `bytes`, which must not be empty. Returns the character, or `None` for an
/// invalid sequence, and the number of bytes it takes.
pub(super) fn decode(bytes: &[u8]) -> (Option<char>, usize) {
    let first = bytes[0];
    let len = match first {
        0x00..0x80 => return (char::from_u32(first.into()), 1),
        0x80..0xc0 | 0xfe.. => return (None, 1),
        _ => first.leading_ones() as usize,
    };
    let mut value = u32::from(first) & ((1 << (7 - len)) - 1);
    for i in 1..len {
        match bytes.get(i) {
            Some(&byte) if byte & 0xc0 == 0x80 => value = value << 6 | u32::from(byte & 0x3f),
            _ => return (None, i),
        }
    }
    let overlong = value < [0x80, 0x800, 0x1_0000, 0x20_0000, 0x400_0000][len - 2]
        && !(value == 0 && len == 2);
    (if overlong { None } else { character(value) }, len)
}

/// Returns the character of a code point; `None` for a surrogate or a noncharacter.
pub(super) fn character(code_point: u32) -> Option<char> {
    let noncharacter = matches!(code_point, 0xfdd0..=0xfdef) || code_point & 0xfffe == 0xfffe;
    if noncharacter { None } else { char::from_u32(code_point) }
}

/// Returns the text of `bytes` up to the first NUL, as for a C string, with U+FFFD for each invalid
/// sequence.
pub(super) fn lossy(bytes: &[u8]) -> String {
    let mut rest = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut text = String::new();
    while !rest.is_empty() {
        let (found, len) = decode(rest);
        text.push(found.unwrap_or(char::REPLACEMENT_CHARACTER));
        rest = &rest[len..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utf8_as_qemu_reads_it() {
        assert_eq!(decode("é".as_bytes()), (Some('é'), 2));
        assert_eq!(decode("😀!".as_bytes()), (Some('😀'), 4));
        assert_eq!(decode(b"\xc0\x80"), (Some('\0'), 2), "modified UTF-8");
        assert_eq!(decode(b"\xc1\x80"), (None, 2), "overlong");
        assert_eq!(decode(b"\xed\xa0\x80"), (None, 3), "surrogate");
        assert_eq!(decode(b"\xef\xbf\xbf"), (None, 3), "noncharacter");
        assert_eq!(decode(b"\xc3("), (None, 1), "continuation missing");
        assert_eq!(decode(b"\xf8\x88\x80\x80\x80"), (None, 5), "beyond Unicode");
        assert_eq!(decode(b"\xff"), (None, 1));
        assert_eq!(lossy(b"a\xff\x01\0b"), "a\u{fffd}\u{1}");
    }
}
