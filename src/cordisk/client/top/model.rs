//! The model of the screen: the watched disks, and the last answer for each.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::rates::{self, Rates};
use crate::map::Cells;
use control::facts::{DiskStatus, SourceStatus};

/// How many intervals are kept for the curves.
const HISTORY: usize = 240;

/// How long the result of a key stays on the screen.
const MESSAGE_TIME: Duration = Duration::from_secs(4);

/// The text for a disk after a failed write to its image.
pub(super) const FAILED: &str = "writing has failed for good: unmount, then cordisk check";

/// The result of one query of a disk.
#[derive(Debug)]
pub(super) struct LastSeen {
    pub status: DiskStatus,
    pub cells: Option<Cells>,
    pub at: Instant,
}

/// The state of one disk on the screen.
#[derive(Debug, Default)]
pub(super) struct DiskView {
    /// The mountpoint; until it is known, the name by which the disk was found.
    pub name: String,
    pub last: Option<LastSeen>,
    pub rates: Option<Rates>,
    /// Bytes per second that each of the servers has sent, in the order of the sources of `last`.
    pub fetched: Vec<Option<f64>>,
    /// Bytes per second read and written in each interval, the latest last.
    pub history: VecDeque<(f64, f64)>,
    /// Why the disk does not answer any more; `None` if it answers.
    pub gone: Option<String>,
}

impl DiskView {
    pub fn new(name: String) -> DiskView {
        DiskView { name, ..DiskView::default() }
    }

    /// Stores the result of a query.
    pub fn see(&mut self, seen: Result<LastSeen, String>) {
        let mut seen = match seen {
            Ok(seen) => seen,
            Err(why) => {
                self.gone = Some(why);
                self.rates = None;
                return;
            }
        };
        self.gone = None;
        if let Some(mountpoint) = &seen.status.mountpoint {
            self.name.clone_from(mountpoint);
        }
        let before = self.last.take();
        self.rates = before.as_ref().and_then(|before| {
            let seconds = seen.at.saturating_duration_since(before.at).as_secs_f64();
            Rates::between(&before.status, &seen.status, seconds)
        });
        self.fetched = before.as_ref().map_or_else(Vec::new, |before| {
            let seconds = seen.at.saturating_duration_since(before.at).as_secs_f64();
            rates::fetched(&before.status, &seen.status, seconds)
        });
        if let Some(rates) = &self.rates {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back((rates.read.bytes, rates.write.bytes));
        }
        if seen.cells.is_none() {
            seen.cells = before.and_then(|before| before.cells);
        }
        self.last = Some(seen);
    }

    /// The servers of remote backing files, each with its bytes per second.
    pub fn sources(&self) -> impl Iterator<Item = (&SourceStatus, Option<f64>)> {
        let sources = self.status().map_or(&[][..], |status| &status.sources);
        let rates = self.fetched.iter().copied().chain(std::iter::repeat(None));
        sources.iter().zip(rates)
    }

    pub fn status(&self) -> Option<&DiskStatus> {
        self.last.as_ref().map(|last| &last.status)
    }
}

/// The state of the whole screen.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub disks: Vec<DiskView>,
    pub selected: usize,
    pub help: bool,
    /// The result of the last key, and its time.
    pub message: Option<(String, Instant)>,
    /// Seconds between two queries.
    pub interval: f64,
}

impl Model {
    pub fn selected(&self) -> Option<&DiskView> {
        self.disks.get(self.selected)
    }

    /// Removes a message that was shown long enough; returns whether it removed one.
    pub fn forget_old_message(&mut self) -> bool {
        self.message.take_if(|(_, since)| since.elapsed() > MESSAGE_TIME).is_some()
    }

    /// Selects the next or the previous disk, within the list.
    pub fn choose(&mut self, down: bool) {
        let last = self.disks.len().saturating_sub(1);
        self.selected =
            if down { (self.selected + 1).min(last) } else { self.selected.saturating_sub(1) };
        self.message = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pid: u32, hits: u64, at: Instant) -> Result<LastSeen, String> {
        let status = DiskStatus {
            pid: Some(pid),
            hits,
            mountpoint: Some("/srv/vm.raw".into()),
            ..DiskStatus::default()
        };
        Ok(LastSeen { status, cells: None, at })
    }

    #[test]
    fn a_disk_comes_goes_and_comes_back() {
        let mut disk = DiskView::new("/some/socket".into());
        let start = Instant::now();
        disk.see(seen(1, 5, start));
        assert_eq!((disk.name.as_str(), disk.rates), ("/srv/vm.raw", None), "one look has no rate");
        disk.see(seen(1, 9, start + Duration::from_secs(1)));
        assert_eq!(
            (disk.rates.unwrap().hit_ratio().as_deref(), disk.history.len()),
            (Some("100 %"), 1)
        );
        disk.see(Err("no daemon".into()));
        assert_eq!((disk.rates, disk.gone.as_deref()), (None, Some("no daemon")));
        assert!(disk.status().is_some(), "what was last seen stays");
        disk.see(seen(2, 3, start + Duration::from_secs(5)));
        assert_eq!((disk.gone.as_deref(), disk.rates), (None, None), "another process");
        for second in 6..600 {
            disk.see(seen(2, 3, start + Duration::from_secs(second)));
        }
        assert_eq!(disk.history.len(), HISTORY);
    }

    #[test]
    fn the_choice_stays_inside_the_list() {
        let mut model = Model {
            disks: (0..3).map(|n| DiskView::new(n.to_string())).collect(),
            ..Model::default()
        };
        model.choose(false);
        assert_eq!(model.selected, 0);
        (0..5).for_each(|_| model.choose(true));
        assert_eq!(model.selected, 2);
        model.disks.clear();
        model.choose(true);
        assert!(model.selected().is_none());
    }
}
