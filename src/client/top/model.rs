//! What the screen shows: the disks that are watched, and what was seen of each.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::rates::Rates;
use crate::client::facts::Facts;
use crate::map::Cells;

/// How many intervals are remembered for the curves.
const HISTORY: usize = 240;

/// How long the answer to a key stays on the screen.
const MESSAGE_TIME: Duration = Duration::from_secs(4);

/// What is said of a disk whose image could not be written to.
pub(super) const FAILED: &str = "writing has failed for good: unmount, then cordisk check";

/// What one look at a disk has brought.
#[derive(Debug)]
pub(super) struct Seen {
    pub status: Facts,
    pub cells: Option<Cells>,
    pub at: Instant,
}

/// One disk.
#[derive(Debug, Default)]
pub(super) struct DiskView {
    /// Where it is mounted; where it was looked for until that is known.
    pub name: String,
    pub last: Option<Seen>,
    pub rates: Option<Rates>,
    /// Bytes per second read and written, the latest last.
    pub history: VecDeque<(f64, f64)>,
    /// Nobody answers any more: why.
    pub gone: Option<String>,
}

impl DiskView {
    pub fn new(name: String) -> DiskView {
        DiskView { name, ..DiskView::default() }
    }

    /// Takes in what was seen.
    pub fn see(&mut self, seen: Result<Seen, String>) {
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

    pub fn status(&self) -> Option<&Facts> {
        self.last.as_ref().map(|last| &last.status)
    }
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub disks: Vec<DiskView>,
    pub selected: usize,
    pub help: bool,
    /// What came of the last key, and when.
    pub message: Option<(String, Instant)>,
    /// Seconds between two looks.
    pub interval: f64,
}

impl Model {
    pub fn selected(&self) -> Option<&DiskView> {
        self.disks.get(self.selected)
    }

    /// Takes a message away that was there long enough; says whether there was one.
    pub fn forget_old_message(&mut self) -> bool {
        self.message.take_if(|(_, since)| since.elapsed() > MESSAGE_TIME).is_some()
    }

    /// Up or down, not beyond the ends.
    pub fn choose(&mut self, down: bool) {
        let last = self.disks.len().saturating_sub(1);
        self.selected = if down { (self.selected + 1).min(last) } else { self.selected.saturating_sub(1) };
        self.message = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pid: u32, hits: u64, at: Instant) -> Result<Seen, String> {
        let status = Facts { pid: Some(pid), hits, mountpoint: Some("/srv/vm.raw".into()), ..Facts::default() };
        Ok(Seen { status, cells: None, at })
    }

    #[test]
    fn a_disk_comes_goes_and_comes_back() {
        let mut disk = DiskView::new("/some/socket".into());
        let start = Instant::now();
        disk.see(seen(1, 5, start));
        assert_eq!((disk.name.as_str(), disk.rates), ("/srv/vm.raw", None), "one look has no rate");
        disk.see(seen(1, 9, start + Duration::from_secs(1)));
        assert_eq!((disk.rates.unwrap().hit_ratio().as_deref(), disk.history.len()), (Some("100 %"), 1));
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
        let mut model = Model { disks: (0..3).map(|n| DiskView::new(n.to_string())).collect(), ..Model::default() };
        model.choose(false);
        assert_eq!(model.selected, 0);
        (0..5).for_each(|_| model.choose(true));
        assert_eq!(model.selected, 2);
        model.disks.clear();
        model.choose(true);
        assert!(model.selected().is_none());
    }
}
