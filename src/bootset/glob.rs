//! `*` and `?` within the name of a file.

/// Whether `name` matches `pattern`. It takes at most the product of both lengths.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    // For each length of a beginning of `name`: whether the pattern so far matches it.
    let name: Vec<char> = name.chars().collect();
    let mut reached = vec![false; name.len() + 1];
    if let Some(first) = reached.first_mut() {
        *first = true;
    }
    for wanted in pattern {
        let mut next = vec![false; name.len() + 1];
        let mut any = false;
        for (length, slot) in next.iter_mut().enumerate() {
            let before = length.checked_sub(1);
            let last = before.and_then(|before| name.get(before)).copied();
            let was = |length: usize| reached.get(length).copied().unwrap_or_default();
            any |= was(length);
            *slot = match wanted {
                '*' => any,
                '?' => before.is_some_and(was),
                other => last == Some(other) && before.is_some_and(was),
            };
        }
        reached = next;
    }
    reached.last().copied().unwrap_or_default()
}

/// Whether a name of a path is a pattern.
pub(crate) fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?'])
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_and_question_marks() {
        for (pattern, name, expected) in [
            ("vmlinuz-*", "vmlinuz-6.1.0", true),
            ("vmlinuz-*", "vmlinuz", false),
            ("*.conf", "a.conf", true),
            ("*.conf", "a.conf~", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
