//! Texts of errors, without what could be a secret.
//!
//! The errors of HTTP libraries print the whole URL of a request, and the query of a presigned URL
//! is a credential.
//!
//! **Touches:** nothing. **Never:** prints a query value other than those of
//! [`remote::url::redacted`]. **Locks:** none.

use std::error::Error;

use remote::url::redacted_text as clean;

/// The chain of causes below and including `error` on one line, outermost first, without the
/// repetitions of errors that print their cause themselves. Every URL loses its query.
pub(crate) fn text(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    for error in chain(error) {
        // Display of reqwest appends the URL; without_url consumes the error, so clean cuts it.
        let part = clean(&error.to_string());
        if !part.is_empty() && !parts.iter().any(|before| before.contains(&part)) {
            parts.push(part);
        }
    }
    host::error::one_line(&parts.join(": "))
}

/// The causes of an error, `error` first. An [`std::io::Error`] that wraps another error does not
/// return that error as its source, so it is looked into.
pub(crate) fn chain<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    /// Errors do not nest deeper; a cycle ends here.
    const DEEPEST: usize = 32;
    fn cause<'a>(error: &&'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
        let error: &'a (dyn Error + 'static) = *error;
        match error.downcast_ref::<std::io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => error.source(),
        }
    }
    std::iter::successors(Some(error), cause).take(DEEPEST)
}

/// The line about a panic of a thread.
pub(crate) fn panic_line(thread: &str, message: &str) -> String {
    host::error::one_line(&format!("thread {thread} panicked: {}", clean(message)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt;
    use std::io;

    #[derive(Debug)]
    struct Outer(io::Error);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "error sending request for url (https://u:p@host/x?X-Amz-Signature=abc&y=1)")
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn the_chain_is_on_one_line_without_queries() {
        let inner = io::Error::other("bad\n /disk?sig=abc");
        let text = text(&Outer(io::Error::other(Outer(inner))));
        assert_eq!(text, "error sending request for url (https://host/x?…): bad\\n /disk?…");
    }

    #[test]
    fn a_panic_is_one_line_without_queries() {
        assert_eq!(
            panic_line("fetch-1", "panicked at src/a.rs:1:2:\nno https://h/p?sig=abc here"),
            "thread fetch-1 panicked: panicked at src/a.rs:1:2:\\nno https://h/p?… here"
        );
    }

    #[test]
    fn words_that_are_no_url_stay() {
        assert_eq!(clean("what? a = b: c"), "what? a = b: c");
        assert_eq!(clean("<https://h/p?a=b>, (x)"), "<https://h/p?…>, (x)");
    }
}
