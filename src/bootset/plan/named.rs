//! Paths that the user has named.

use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::Walk;

/// Takes the files and directories that `paths` name, after the metadata of the file system.
/// `is_boot`: the file system is mounted at /boot, and only what lies there is taken from it.
pub(super) fn take(walk: &mut Walk, paths: &[String], is_boot: bool) -> Step<()> {
    super::mount::take(walk)?;
    walk.stage(Stage::Named);
    let depth = walk.ext4.disk.budget.limits.deepest_directory;
    for path in paths {
        let below =
            path.strip_prefix("/boot").filter(|rest| rest.is_empty() || rest.starts_with('/'));
        let pattern = match below {
            _ if !is_boot => path.as_str(),
            Some("") => "/",
            Some(below) => below,
            None => continue,
        };
        let mut is_found = false;
        for path in walk.expand(pattern)? {
            if walk.has(&path)? {
                is_found = true;
                if walk.take_tree(&path, depth, u64::MAX)? {
                    walk.is_complete = false;
                    walk.notes.push(format!("{path}: what is deeper is left out"));
                }
            }
        }
        if !is_found {
            walk.notes.push(format!("{path}: there is no such file"));
        }
    }
    Ok(())
}
