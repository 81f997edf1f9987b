//! Bars and curves of block characters.

/// Eighths of a character, from the left.
const EIGHTHS: [char; 7] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];
/// Eighths of a character, from below.
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Returns the filled and the empty part of a bar of `width` characters, filled in the ratio of
/// `part` to `whole`. It is full only if `part` is the whole.
pub(super) fn bar(part: u64, whole: u64, width: usize) -> (String, String) {
    let most = width * 8;
    let steps = (u128::from(part.min(whole)) * most as u128).checked_div(u128::from(whole));
    let steps = steps.and_then(|steps| usize::try_from(steps).ok()).unwrap_or(most);
    let mut full: String = std::iter::repeat_n('█', steps / 8).collect();
    if let Some(eighth) = (steps % 8).checked_sub(1) {
        full.push(EIGHTHS[eighth]);
    }
    let empty = " ".repeat(width - full.chars().count());
    (full, empty)
}

/// Returns the last values as a curve of at most `width` characters, the latest on the right. Every
/// value above zero is visible.
pub(super) fn curve(
    values: impl DoubleEndedIterator<Item = f64>,
    most: f64,
    width: usize,
) -> String {
    let mut last: Vec<char> = values.rev().take(width).map(|value| level(value, most)).collect();
    last.resize(width, ' ');
    last.iter().rev().collect()
}

fn level(value: f64, most: f64) -> char {
    if value <= 0.0 || most <= 0.0 {
        return ' ';
    }
    let step = (value / most * LEVELS.len() as f64).ceil() as usize;
    LEVELS[step.clamp(1, LEVELS.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_has_its_width_and_is_full_only_at_the_end() {
        assert_eq!(bar(0, 1, 4), (String::new(), "    ".into()));
        assert_eq!(bar(1, 2, 4), ("██".into(), "  ".into()));
        assert_eq!(bar(17, 32, 4), ("██▏".into(), " ".into()));
        assert_eq!(bar(u64::MAX - 1, u64::MAX, 4), ("███▉".into(), String::new()));
        assert_eq!(bar(1, 1, 4), ("████".into(), String::new()));
        assert_eq!(bar(7, 1, 0), (String::new(), String::new()));
        assert_eq!(bar(0, 0, 2), ("██".into(), String::new()), "nothing is complete");
    }

    #[test]
    fn a_curve_ends_with_the_latest() {
        assert_eq!(curve([0.0, 1.0, 4.0, 8.0].into_iter(), 8.0, 6), "   ▁▄█");
        assert_eq!(curve([1.0, 2.0, 3.0].into_iter(), 8.0, 2), "▂▃");
        assert_eq!(curve([1e-9].into_iter(), 8.0, 1), "▁");
        assert_eq!(curve([1.0].into_iter(), 0.0, 2), "  ");
    }
}
