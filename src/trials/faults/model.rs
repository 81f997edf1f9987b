//! A model of the bytes that the guest may read.

use std::ops::Range;

/// A change of the guest's bytes.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write(u64, Vec<u8>),
    Zero(Range<u64>),
    Size(u64),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Change::Write(at, data) => {
                content[*at as usize..*at as usize + data.len()].copy_from_slice(data)
            }
            Change::Zero(range) => content[range.start as usize..range.end as usize].fill(0),
            Change::Size(size) => content.resize(*size as usize, 0),
        }
    }
}

/// Lists of possible contents: each byte has its value in one of them. After a failed request,
/// which may have been done in part, there is more than one.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Contents that a read may return.
    live: Vec<Vec<u8>>,
    /// Older contents that an unflushed disk may still hold, besides those in `live`.
    past: Vec<Vec<u8>>,
}

impl Model {
    pub fn new(content: Vec<u8>) -> Model {
        Model { live: vec![content], past: Vec::new() }
    }

    /// Records a request that succeeded.
    pub fn done(&mut self, change: &Change) {
        self.past.extend(self.live.iter().cloned());
        self.live.iter_mut().for_each(|content| change.apply(content));
        self.live.dedup();
    }

    /// Records a request that failed: each byte of it is old or new.
    pub fn perhaps(&mut self, change: &Change) {
        for mut content in self.live.clone() {
            change.apply(&mut content);
            self.live.push(content);
        }
        self.live.dedup();
    }

    /// Records a flush that succeeded.
    pub fn flushed(&mut self) {
        self.past.clear();
    }

    /// Records a kill: each change since the last flush may be on disk or not.
    pub fn killed(&mut self) {
        self.live.append(&mut self.past);
    }

    /// Panics unless a read at `at` may return these bytes.
    pub fn assert_reads(&self, what: &str, at: u64, bytes: &[u8]) {
        assert_one_of(what, &self.live.iter().collect::<Vec<_>>(), at, bytes);
    }

    /// Panics unless a read of the whole disk may return these bytes.
    pub fn assert_is(&self, what: &str, bytes: &[u8]) {
        assert!(
            self.live.iter().any(|content| content.len() == bytes.len()),
            "{what}: size {}",
            bytes.len()
        );
        self.assert_reads(what, 0, bytes);
    }

    /// Panics unless a disk that is left now may have these bytes.
    pub fn assert_left(&self, what: &str, bytes: &[u8]) {
        let all: Vec<_> = self.live.iter().chain(&self.past).collect();
        assert!(
            all.iter().any(|content| content.len() == bytes.len()),
            "{what}: size {}",
            bytes.len()
        );
        assert_one_of(what, &all, 0, bytes);
    }
}

fn assert_one_of(what: &str, contents: &[&Vec<u8>], at: u64, bytes: &[u8]) {
    let at = at as usize;
    // A content that is too short for the range is older than the growth of the disk: the rest is
    // zeros.
    let part = |content: &[u8], range: Range<usize>| -> Vec<u8> {
        let start = content.len().min(range.start);
        let mut part = content[start..content.len().min(range.end)].to_vec();
        part.resize(range.len(), 0);
        part
    };
    if contents.iter().any(|content| content.get(at..at + bytes.len()) == Some(bytes)) {
        return;
    }
    for (index, piece) in bytes.chunks(512).enumerate() {
        let start = at + index * 512;
        let allowed: Vec<_> =
            contents.iter().map(|content| part(content, start..start + piece.len())).collect();
        if allowed.iter().any(|allowed| allowed == piece) {
            continue;
        }
        for (offset, byte) in piece.iter().enumerate() {
            let values: Vec<u8> = allowed.iter().map(|allowed| allowed[offset]).collect();
            assert!(
                values.contains(byte),
                "{what}: byte {:#x} is {byte:#x}, allowed {values:x?}",
                start + offset
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_is_old_or_new_and_nothing_else() {
        let mut model = Model::new(vec![1; 600]);
        model.perhaps(&Change::Write(10, vec![2; 4]));
        let mut bytes = vec![1; 600];
        bytes[11] = 2;
        model.assert_is("torn", &bytes);
        bytes[14] = 2;
        assert!(std::panic::catch_unwind(|| model.assert_is("beside it", &bytes)).is_err());
        model.done(&Change::Write(0, vec![3; 600]));
        model.assert_is("new", &[3; 600]);
        model.assert_left("not flushed", &[1; 600]);
        model.flushed();
        assert!(std::panic::catch_unwind(|| model.assert_left("flushed", &[1; 600])).is_err());
    }
}
