//! The kernel that is started by default, and its initrd.

use std::cmp::Ordering;

use super::Facts;
use super::loader::Configuration;
use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::{Walk, base_name, join};

/// Words with which a line of a configuration names a kernel (GRUB, extlinux, loader entries).
const KERNEL: &[&str] = &["linux", "linux16", "linuxefi", "kernel"];
/// Words with which it names an initrd.
const INITRD: &[&str] = &["initrd", "initrd16", "initrdefi"];

/// Takes the default kernel and its initrd: those that the configuration of the boot loader names
/// first, else the symbolic links in / and in `prefix`, else the newest by its name.
pub(super) fn take(
    walk: &mut Walk,
    prefix: &str,
    configurations: &[Configuration],
    facts: &mut Facts,
) -> Step<()> {
    walk.stage(Stage::Kernel);
    for configuration in configurations {
        if let Some(kernel) = named(walk, configuration, KERNEL)? {
            walk.notes.push(format!("kernel {kernel}, by the boot loader"));
            remember(facts, &kernel);
            named(walk, configuration, INITRD)?;
            return Ok(());
        }
    }
    for (kernel, initrds) in [
        ("/vmlinuz".to_owned(), ["/initrd.img".to_owned(), "/initrd".to_owned()]),
        (format!("{prefix}/vmlinuz"), [format!("{prefix}/initrd.img"), format!("{prefix}/initrd")]),
    ] {
        if let Some(found) = walk.take(&kernel)? {
            walk.notes.push(format!("kernel {}, by a link", found.path));
            remember(facts, &found.path);
            for initrd in initrds {
                walk.take(&initrd)?;
            }
            return Ok(());
        }
    }
    newest(walk, prefix, facts)
}

/// Takes the files of the first line that begins with one of `words` and names files that exist.
/// Returns the first of them.
fn named(walk: &mut Walk, from: &Configuration, words: &[&str]) -> Step<Option<String>> {
    for line in from.text.lines() {
        walk.ext4.disk.budget.step()?;
        let mut parts = line.split_whitespace();
        let Some(word) = parts.next() else { continue };
        if !words.iter().any(|known| known.eq_ignore_ascii_case(word)) {
            continue;
        }
        let mut first = None;
        // An initrd can have several parts: microcode comes first.
        for part in parts.flat_map(|part| part.split(',')).take(8) {
            let part = part.trim_matches(['"', '\'']).replace("($root)", "");
            let path = if part.starts_with('/') { part } else { join(&from.directory, &part) };
            let found = walk.take(&path)?;
            let found = match found {
                Some(found) => Some(found),
                // A path of extlinux or of an entry can be relative to the partition or to /boot.
                None if from.directory.starts_with("/boot") => {
                    walk.take(&format!("/boot{path}"))?
                }
                None => None,
            };
            if let Some(found) = found {
                first.get_or_insert(found.path);
            } else if first.is_none() {
                break;
            }
        }
        if first.is_some() {
            return Ok(first);
        }
    }
    Ok(None)
}

fn newest(walk: &mut Walk, prefix: &str, facts: &mut Facts) -> Step<()> {
    let directory = if prefix.is_empty() { "/" } else { prefix };
    let mut names = walk.names(directory)?;
    names.retain(|name| name.starts_with("vmlinuz-") || name.starts_with("vmlinux-"));
    names.sort_by(|a, b| compare_versions(a, b));
    let Some(name) = names.pop() else {
        walk.notes.push("no kernel was found in it".to_owned());
        return Ok(());
    };
    let path = join(directory, &name);
    walk.take(&path)?;
    walk.notes.push(format!("kernel {path}, the newest"));
    remember(facts, &path);
    let Some(version) = facts.kernel.clone() else { return Ok(()) };
    for initrd in [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
    ] {
        walk.take(&join(directory, &initrd))?;
    }
    Ok(())
}

/// The version is what follows the first hyphen of the name.
fn remember(facts: &mut Facts, kernel: &str) {
    if let Some((_, version)) = base_name(kernel).split_once('-') {
        facts.kernel = Some(version.to_owned());
    }
}

/// Compares names by the numbers in them: 6.10 is newer than 6.9.
pub(super) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.chars().peekable(), b.chars().peekable());
    loop {
        match (a.peek().copied(), b.peek().copied()) {
            (None, None) => return Ordering::Equal,
            (None, _) => return Ordering::Less,
            (_, None) => return Ordering::Greater,
            (Some(x), Some(y)) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let number = |digits: &mut std::iter::Peekable<std::str::Chars<'_>>| {
                    let mut number = 0_u128;
                    while let Some(digit) = digits.peek().and_then(|c| c.to_digit(10)) {
                        number = number.saturating_mul(10).saturating_add(digit.into());
                        digits.next();
                    }
                    number
                };
                match number(&mut a).cmp(&number(&mut b)) {
                    Ordering::Equal => {}
                    different => return different,
                }
            }
            (Some(x), Some(y)) if x == y => {
                a.next();
                b.next();
            }
            (Some(x), Some(y)) => return x.cmp(&y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let mut names = ["vmlinuz-6.10.1", "vmlinuz-6.9.3", "vmlinuz-6.9.3-10", "vmlinuz-6.9.3-9"];
        names.sort_by(|a, b| compare_versions(a, b));
        assert_eq!(
            names,
            ["vmlinuz-6.9.3", "vmlinuz-6.9.3-9", "vmlinuz-6.9.3-10", "vmlinuz-6.10.1"]
        );
    }
}
