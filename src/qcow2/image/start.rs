//! The last steps of opening an image for writing.

use super::Image;
use host::{ErrorKind, Result};

/// When to search an image for leaks before its first change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LeakSearch {
    /// If a crash may have left some ([`Image::may_leak`]). An image with too many clusters for the
    /// search is written all the same, and its leaks stay.
    AfterCrash,
    /// In any case; an image with too many clusters is an error.
    Always,
    /// Not now: a guest waits for the image of a process that has died
    /// ([`Image::search_step`]).
    Later,
}

impl Image {
    /// Searches for leaks, begins writing, and gives the leaks back. Callers call this once, after
    /// every other step of the open that can fail. Returns the number of clusters that were given
    /// back.
    ///
    /// # Errors
    /// As [`Image::find_leaks`], before which nothing is changed; as [`Image::begin_writing`] and
    /// [`Image::give_back`].
    pub fn start_writing(&self, search: LeakSearch) -> Result<u64> {
        let leaks = match search {
            LeakSearch::Always => Some(self.find_leaks()?),
            LeakSearch::Later => None,
            LeakSearch::AfterCrash if !self.may_leak() => None,
            LeakSearch::AfterCrash => match self.find_leaks() {
                Err(error) if error.kind() == ErrorKind::UnsupportedFeature => {
                    log::warn!("{error}; what a crash has leaked is not given back");
                    None
                }
                found => Some(found?),
            },
        };
        self.begin_writing()?;
        let Some(leaks) = leaks else { return Ok(0) };
        self.give_back(&leaks)?;
        Ok(leaks.clusters())
    }
}
