//! Bytes as text that is one word: what the kernel lets a name contain, a line of output must not.
//!
//! Printable ASCII stays, except the bytes that mean something in a listing (space, `=`, `\`); the rest
//! becomes `\xNN`. So each name has exactly one spelling and each spelling one name.

use std::fmt::Write as _;

/// `bytes` as one word of printable ASCII.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'=' | b'\\' => write!(out, "\\x{byte:02x}").expect("a String takes everything"),
            0x21..=0x7e => out.push(char::from(byte)),
            _ => write!(out, "\\x{byte:02x}").expect("a String takes everything"),
        }
    }
    out
}

/// `bytes` as lower-case hexadecimal digits; what values of extended attributes are listed as.
pub fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        write!(out, "{byte:02x}").expect("a String takes everything");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_never_contains_what_separates_words() {
        let all: Vec<u8> = (0..=255).collect();
        let word = escape(&all);
        assert!(word.bytes().all(|b| (0x21..=0x7e).contains(&b)), "{word}");
        assert!(!word.contains('='));
        assert_eq!(escape(b"a b\n\xff"), "a\\x20b\\x0a\\xff");
        assert_eq!(hex(b"\x00\n\xff"), "000aff");
    }
}
