//! Paths and symbolic links, as path_resolution(7) has them.

use std::rc::Rc;

use super::{Ext4, FileKind, Inode};
use crate::failure::{Failure, Step};

/// Inode of the root directory.
const ROOT: u32 = 2;
/// Links that one path may lead through (MAXSYMLINKS of Linux).
const MOST_LINKS: usize = 40;
/// Bytes of a path (PATH_MAX of Linux).
const LONGEST: u64 = 4096;

/// A file that a path leads to.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) inode: Rc<Inode>,
    /// Its path without links.
    pub(crate) path: String,
}

/// Whether a link at the end of the path is followed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Last {
    Follow,
    Keep,
}

impl Ext4 {
    /// Finds the file at an absolute path, through all links.
    pub(crate) fn resolve(&mut self, path: &str) -> Step<Resolved> {
        self.walk(path, Last::Follow)
    }

    /// Finds what a path names: a link at its end is not followed.
    pub(crate) fn resolve_link(&mut self, path: &str) -> Step<Resolved> {
        self.walk(path, Last::Keep)
    }

    /// Returns the target of a symbolic link.
    pub(crate) fn link_target(&mut self, inode: &Inode) -> Step<String> {
        if inode.kind != FileKind::Link || inode.size == 0 || inode.size >= LONGEST {
            return Err(Failure::damaged(format!("inode {} is no link", inode.number)));
        }
        let size = usize::try_from(inode.size).unwrap_or_default();
        let is_short = inode.inline.is_none() && !inode.has_extents && size < 60;
        let target = if is_short {
            inode.block.get(..size).unwrap_or_default().to_vec()
        } else {
            // The kernel reads this block to follow the link, so it is metadata here.
            for extent in self.extents(inode, LONGEST)? {
                self.touched.extend(self.bytes_of(extent.physical, extent.count));
            }
            self.content(inode, LONGEST)?
        };
        Ok(String::from_utf8_lossy(&target).into_owned())
    }

    fn walk(&mut self, path: &str, last: Last) -> Step<Resolved> {
        // Names that are still to be walked, the next one at the end.
        let mut names: Vec<String> = split(path);
        // The directories from the root down to the current one.
        let mut parents: Vec<(Rc<Inode>, String)> = Vec::new();
        let mut here = self.inode(ROOT)?;
        let mut at = String::new();
        let mut links = 0;
        while let Some(name) = names.pop() {
            self.disk.budget.step()?;
            if name == ".." {
                if let Some((parent, path)) = parents.pop() {
                    (here, at) = (parent, path);
                }
                continue;
            }
            let directory = self.directory(&here)?;
            let child = directory.find(&name).ok_or(Failure::Absent)?;
            let child = self.inode(child)?;
            let is_followed = !names.is_empty() || last == Last::Follow;
            if child.kind == FileKind::Link && is_followed {
                links += 1;
                let target = self.link_target(&child)?;
                if links > MOST_LINKS || names.len() as u64 > LONGEST {
                    return Err(Failure::damaged(format!("{path}: too many symbolic links")));
                }
                if target.starts_with('/') {
                    parents.clear();
                    here = self.inode(ROOT)?;
                    at.clear();
                }
                names.extend(split(&target));
                continue;
            }
            parents.push((here, at.clone()));
            here = child;
            at = format!("{at}/{name}");
            if at.len() as u64 > LONGEST {
                return Err(Failure::Absent);
            }
        }
        Ok(Resolved { inode: here, path: if at.is_empty() { "/".to_owned() } else { at } })
    }
}

/// The names of a path, the first one at the end.
fn split(path: &str) -> Vec<String> {
    let names = path.split('/').filter(|name| !name.is_empty() && *name != ".");
    names.rev().map(str::to_owned).collect()
}
