//! Tests of the cache in one process.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use super::*;
use crate::pin::{Pin, Validator};
use crate::url::SourceUrl;
use host::storage::BlockStatus;

const SIZE: u64 = 10 * BLOCK + 100;

fn url() -> SourceUrl {
    SourceUrl::parse("s3://golden/base.raw").unwrap()
}

fn pin(size: u64) -> Pin {
    Pin { size, validator: Validator::Etag("\"1\"".to_owned()), digest: None }
}

fn open(dir: &tempfile::TempDir) -> CacheDirectory {
    CacheDirectory::open(&dir.path().join("cache"), None).unwrap()
}

/// The bytes that the remote file of these tests has at `range`.
fn bytes(range: Range<u64>) -> Vec<u8> {
    range.map(|at| (at / 251 + at % 241) as u8 | 1).collect()
}

fn got(claim: Claim) -> ClaimedRange {
    match claim {
        Claim::Got(claimed) => claimed,
        other => panic!("{other:?} instead of a claim"),
    }
}

/// Downloads the blocks around a range.
fn fill(object: &CacheObject, range: Range<u64>) {
    let claimed = got(object.claim(&range).unwrap());
    let range = claimed.range();
    object.write_at(range.start, &bytes(range.clone())).unwrap();
    object.mark_present(&range).unwrap();
}

fn reader(object: &CacheObject) -> CacheReader {
    let (data, map) = object.files_for_reader().unwrap();
    CacheReader::new(data, map, object.size()).unwrap()
}

/// Protects: the status is a hole only where present blocks are zero, and for no byte more; a hole
/// that has left the cache is none from then on.
#[test]
fn only_present_zeros_are_holes() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let reader = reader(&object);
    let status = |offset, max| reader.status(offset, max).unwrap();
    assert_eq!(status(10, SIZE), (BlockStatus::Data, SIZE - 10), "absent");
    fill(&object, BLOCK..2 * BLOCK);
    let zeros = 2 * BLOCK..5 * BLOCK;
    let claimed = got(object.claim(&zeros).unwrap());
    object.mark_zero(&zeros).unwrap();
    drop(claimed);
    assert_eq!(status(0, SIZE), (BlockStatus::Data, BLOCK), "absent, up to the first present one");
    assert_eq!(status(BLOCK + 5, SIZE), (BlockStatus::Data, BLOCK - 5), "up to the zeros");
    assert_eq!(status(2 * BLOCK + 7, SIZE), (BlockStatus::Hole, 3 * BLOCK - 7));
    assert_eq!(status(2 * BLOCK, BLOCK), (BlockStatus::Hole, BLOCK));
    assert_eq!(status(4 * BLOCK, SIZE), (BlockStatus::Hole, BLOCK), "absent blocks follow");
    object.forget(&(3 * BLOCK..4 * BLOCK)).unwrap();
    assert_eq!(status(3 * BLOCK, BLOCK), (BlockStatus::Data, BLOCK), "forgotten a moment ago");
    assert_eq!(status(2 * BLOCK, SIZE), (BlockStatus::Hole, BLOCK));
    assert_eq!(status(4 * BLOCK, SIZE), (BlockStatus::Hole, BLOCK));
}

/// Protects: a block that a fetcher completes after lseek(2) has seen the hole in its place is no
/// hole, and neither is one that has gone and come back since.
#[test]
fn blocks_that_arrive_during_a_status_are_no_holes() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let zero = |range: Range<u64>| {
        let _claimed = got(object.claim(&range).unwrap());
        object.mark_zero(&range).unwrap();
    };
    zero(0..BLOCK);
    let reader = reader(&object);
    let found = reader.status_after(0, SIZE, || fill(&object, BLOCK..4 * BLOCK)).unwrap();
    assert_eq!(found, (BlockStatus::Hole, BLOCK));
    assert_eq!(reader.status(0, SIZE).unwrap(), (BlockStatus::Hole, BLOCK));

    zero(4 * BLOCK..6 * BLOCK);
    let replace = || {
        object.forget(&(5 * BLOCK..6 * BLOCK)).unwrap();
        fill(&object, 5 * BLOCK..6 * BLOCK);
    };
    let (status, _) = reader.status_after(4 * BLOCK, SIZE, replace).unwrap();
    assert_eq!(status, BlockStatus::Data);
    assert_eq!(reader.status(4 * BLOCK, SIZE).unwrap(), (BlockStatus::Hole, BLOCK));
}

/// Protects: bytes that were read while their blocks were replaced are not used, although the
/// blocks are present again, and although another thread has looked at the map meanwhile.
#[test]
fn blocks_that_have_gone_and_come_back_were_not_present() {
    let dir = tempfile::tempdir().unwrap();
    let shared = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let nameless = CacheObject::anonymous(dir.path(), SIZE).unwrap();
    for object in [&shared, &nameless] {
        let reader = reader(object);
        let range = 0..2 * BLOCK;
        fill(object, range.clone());
        let mark = reader.mark();
        assert!(reader.is_present(&range).unwrap());
        assert!(reader.none_has_gone(mark).unwrap());
        if reader.is_anonymous() {
            assert!(object.punch(&(0..BLOCK)).unwrap());
        } else {
            object.forget(&(0..BLOCK)).unwrap();
        }
        reader.refresh().unwrap();
        fill(object, 0..BLOCK);
        assert!(reader.is_present(&range).unwrap());
        assert!(!reader.none_has_gone(mark).unwrap());
        let mark = reader.mark();
        assert!(reader.is_present(&range).unwrap() && reader.none_has_gone(mark).unwrap());
    }
}

/// Protects: blocks that have gone during a clone, also if they have come back since, and blocks
/// that a commit that is going on may still give up, are not shared.
#[test]
fn a_clone_of_blocks_that_may_have_gone_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let key = crate::pin::cache_key(&url(), &pin(SIZE));
    let path = dir.path().join(format!("cache/{key}.map"));
    let map = std::fs::File::options().write(true).open(path).unwrap();
    let reader = reader(&object);
    let range = BLOCK..3 * BLOCK;
    let cloned = |during: &dyn Fn()| {
        let mut calls = 0;
        let mut clone = |_: &std::fs::File| {
            calls += 1;
            during();
            Ok(())
        };
        let kept = reader.clone_with(&range, &mut clone).unwrap();
        (kept, calls)
    };
    fill(&object, BLOCK..2 * BLOCK);
    assert_eq!(cloned(&|| {}), (false, 0), "absent");
    fill(&object, 2 * BLOCK..3 * BLOCK);
    assert_eq!(cloned(&|| {}), (true, 1));
    let replace = || {
        object.forget(&(BLOCK..2 * BLOCK)).unwrap();
        fill(&object, BLOCK..2 * BLOCK);
    };
    assert_eq!(cloned(&replace), (false, 1));
    assert_eq!(cloned(&|| {}), (true, 1));
    let commit_begins = || map::write_syncing(&map, true).unwrap();
    assert_eq!(cloned(&commit_begins), (false, 1), "not durable");
    object.commit().unwrap();
    assert_eq!(cloned(&commit_begins), (true, 1), "durable");
}

/// Protects: what one object has downloaded, another one and a reader see at once, and only that.
#[test]
fn present_blocks_are_seen_by_other_objects_and_readers() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&dir), open(&dir));
    assert!(one.find(&url(), &pin(SIZE)).unwrap().is_none());
    let writer = one.object(&url(), &pin(SIZE)).unwrap();
    let other = two.find(&url(), &pin(SIZE)).unwrap().expect("exists now");
    let reader = reader(&other);
    assert_eq!(other.next_missing(5, u64::MAX).unwrap(), Some(0..SIZE));
    fill(&writer, 2 * BLOCK + 7..4 * BLOCK);
    fill(&writer, 10 * BLOCK..SIZE);
    for (range, present) in [
        (2 * BLOCK..4 * BLOCK, true),
        (2 * BLOCK - 1..4 * BLOCK, false),
        (2 * BLOCK..4 * BLOCK + 1, false),
        (SIZE - 1..SIZE, true),
        (0..0, true),
        (0..1, false),
    ] {
        assert_eq!(other.is_present(&range).unwrap(), present, "{range:?}");
        assert_eq!(reader.is_present(&range).unwrap(), present, "{range:?}");
        assert_eq!(reader.is_present(&range).unwrap(), present, "{range:?} again");
    }
    assert_eq!(other.next_missing(0, u64::MAX).unwrap(), Some(0..2 * BLOCK));
    assert_eq!(other.next_missing(2 * BLOCK, 2 * BLOCK).unwrap(), None, "only in the range");
    assert_eq!(other.next_missing(2 * BLOCK, 2 * BLOCK + 1).unwrap(), Some(4 * BLOCK..5 * BLOCK));
    assert_eq!(other.next_missing(5 * BLOCK + 1, 2 * BLOCK).unwrap(), Some(5 * BLOCK..8 * BLOCK));
    assert_eq!(other.next_missing(10 * BLOCK, u64::MAX).unwrap(), None);
    assert_eq!(other.next_missing(SIZE * 9, u64::MAX).unwrap(), None);
    let mut buf = vec![0; 2 * BLOCK as usize];
    reader.read_at(2 * BLOCK, &mut buf).unwrap();
    assert!(buf == bytes(2 * BLOCK..4 * BLOCK));
    buf.fill(0);
    assert!(reader.read_cached(2 * BLOCK, &mut buf) && buf == bytes(2 * BLOCK..4 * BLOCK));
    assert!(
        reader.is_present(&(0..SIZE + 1)).is_err() && other.is_present(&(0..SIZE + 1)).is_err()
    );
    assert_eq!(other.present_bytes().unwrap(), 2 * BLOCK + 100);
    assert!(rustix::io::pwrite(reader.data().as_fd(), b"x", 0).is_err(), "for reading only");
}

/// The object of a directory whose data file is another file, as a disk that fails would be.
fn on_data(dir: &tempfile::TempDir, data: &str) -> CacheObject {
    let key = crate::pin::cache_key(&url(), &pin(SIZE));
    let open = |path: &std::path::Path| {
        std::fs::File::options().read(true).write(true).open(path).unwrap()
    };
    let map = open(&dir.path().join(format!("cache/{key}.map")));
    assert!(locks::try_lock(&map, locks::Kind::Shared, &locks::IN_USE).unwrap());
    let directory = std::fs::File::open(dir.path()).unwrap();
    let used = Some((std::sync::Arc::new(directory.into()), "none".to_owned()));
    CacheObject::new(data.to_owned(), SIZE, open(data.as_ref()), map, used, true, true)
}

fn durable_bytes(dir: &tempfile::TempDir) -> u64 {
    open(dir).list().unwrap()[0].durable_bytes
}

const OTHER_BOOT: [u8; 36] = *b"01234567-89ab-cdef-0123-456789abcdef";

/// Protects: a claim excludes threads and processes from its blocks, from its start to its end, and
/// from no others. (Another open object has the locks that another process has.)
#[test]
fn a_claim_excludes_all_others_from_its_blocks_only() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (
        open(&dir).object(&url(), &pin(SIZE)).unwrap(),
        open(&dir).object(&url(), &pin(SIZE)).unwrap(),
    );
    let left = got(one.claim(&(BLOCK + 5..BLOCK + 6)).unwrap());
    let right = got(one.claim(&(2 * BLOCK..4 * BLOCK)).unwrap());
    assert_eq!((left.range(), right.range()), (BLOCK..2 * BLOCK, 2 * BLOCK..4 * BLOCK));
    for object in [&one, &two] {
        for busy in [0..SIZE, BLOCK..BLOCK + 1, 3 * BLOCK..5 * BLOCK] {
            assert!(matches!(object.claim(&busy).unwrap(), Claim::Busy), "{busy:?}");
        }
        got(object.claim(&(0..BLOCK)).unwrap());
        got(object.claim(&(4 * BLOCK..SIZE)).unwrap());
    }
    drop(left);
    got(two.claim(&(BLOCK..2 * BLOCK)).unwrap());
    assert!(matches!(two.claim(&(2 * BLOCK..3 * BLOCK)).unwrap(), Claim::Busy), "neighbour");
    one.write_at(2 * BLOCK, &bytes(2 * BLOCK..4 * BLOCK)).unwrap();
    one.mark_present(&(2 * BLOCK..4 * BLOCK)).unwrap();
    assert!(matches!(two.claim(&(2 * BLOCK..3 * BLOCK)).unwrap(), Claim::Present));
    drop(right);
    assert!(matches!(two.claim(&(2 * BLOCK..4 * BLOCK)).unwrap(), Claim::Present));
    assert!(matches!(two.claim(&(7..7)).unwrap(), Claim::Present), "nothing is there always");
    got(two.claim(&(3 * BLOCK..SIZE)).unwrap());
}

/// Protects: bytes go only into claimed blocks, and a block is present only if all of it was
/// marked.
#[test]
fn only_whole_claimed_blocks_become_present() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let claimed = got(object.claim(&(0..2 * BLOCK)).unwrap());
    for error in [
        object.write_at(2 * BLOCK, &[1]).unwrap_err(),
        object.write_at(2 * BLOCK - 1, &[1, 1]).unwrap_err(),
        object.write_at(u64::MAX, &[1, 1]).unwrap_err(),
        object.mark_present(&(0..3 * BLOCK)).unwrap_err(),
        object.mark_present(&(0..SIZE + 1)).unwrap_err(),
    ] {
        assert_eq!(error.kind(), host::ErrorKind::InvalidArgument, "{error}");
    }
    object.write_at(3 * BLOCK, &[]).expect("nothing goes nowhere");
    object.mark_present(&(1..2 * BLOCK - 1)).unwrap();
    assert_eq!(object.present_bytes().unwrap(), 0);
    object.mark_present(&(1..2 * BLOCK)).unwrap();
    assert_eq!(object.next_missing(0, u64::MAX).unwrap(), Some(0..BLOCK));
    drop(claimed);
    let _last = got(object.claim(&(SIZE - 1..SIZE)).unwrap());
    object.mark_present(&(10 * BLOCK..SIZE)).unwrap();
    assert!(object.is_present(&(10 * BLOCK..SIZE)).unwrap());
}

/// Protects: after another boot, and after the last process is gone, only durable blocks are
/// present. As long as a process has the object open, the others stay as well.
#[test]
fn what_may_be_lost_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    fill(&object, 0..BLOCK);
    object.commit().unwrap();
    fill(&object, BLOCK..2 * BLOCK);
    assert_eq!(durable_bytes(&dir), BLOCK);
    let serving = reader(&object);
    let again = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    assert!(again.is_present(&(0..2 * BLOCK)).unwrap(), "a process uses it");
    drop(again);
    // Still in use, so the last close has not committed.
    let rebooted = CacheDirectory::open_in_boot(&path, None, OTHER_BOOT).unwrap();
    let rebooted = rebooted.object(&url(), &pin(SIZE)).unwrap();
    assert!(rebooted.is_present(&(0..BLOCK)).unwrap());
    assert!(!rebooted.is_present(&(BLOCK..BLOCK + 1)).unwrap());
    fill(&rebooted, BLOCK..3 * BLOCK);
    drop((rebooted, serving, object));
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    assert!(object.is_present(&(0..3 * BLOCK)).unwrap(), "closing has committed");
}

/// Protects: the first open after the last process was killed trusts only durable blocks, also in
/// the same boot.
#[test]
fn the_first_to_open_drops_what_is_not_durable() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    fill(&object, 0..BLOCK);
    drop(object);
    let key = crate::pin::cache_key(&url(), &pin(SIZE));
    let map = std::fs::File::options()
        .read(true)
        .write(true)
        .open(dir.path().join(format!("cache/{key}.map")))
        .unwrap();
    map::replace(&map, &(1..3), |_, _| map::PRESENT).unwrap();
    map::replace(&map, &(3..4), |_, _| 0x7f).unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    assert_eq!(object.next_missing(0, u64::MAX).unwrap(), Some(BLOCK..SIZE));
}

/// Protects: after a failed fdatasync no block that was not durable is present for any process, nor
/// becomes durable later, nor is marked by a download that began before.
#[test]
fn a_failed_commit_loses_what_was_not_durable() {
    let dir = tempfile::tempdir().unwrap();
    let good = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let reader = reader(&good);
    fill(&good, 0..BLOCK);
    good.commit().unwrap();
    fill(&good, BLOCK..2 * BLOCK);
    let _early = got(good.claim(&(8 * BLOCK..9 * BLOCK)).unwrap());
    // fdatasync fails on this device, writes do not.
    let bad = on_data(&dir, "/dev/null");
    let claimed = got(bad.claim(&(2 * BLOCK..3 * BLOCK)).unwrap());
    let early = got(bad.claim(&(5 * BLOCK..6 * BLOCK)).unwrap());
    bad.write_at(2 * BLOCK, &bytes(2 * BLOCK..3 * BLOCK)).unwrap();
    bad.mark_present(&claimed.range()).unwrap();
    assert!(reader.is_present(&(0..3 * BLOCK)).unwrap());
    assert_eq!(bad.commit().unwrap_err().errno(), Some(rustix::io::Errno::INVAL.raw_os_error()));
    for object in [&good, &bad] {
        assert_eq!(object.next_missing(0, u64::MAX).unwrap(), Some(BLOCK..SIZE));
    }
    reader.refresh().unwrap();
    assert!(!reader.is_present(&(BLOCK..2 * BLOCK)).unwrap());
    assert!(reader.is_present(&(0..BLOCK)).unwrap());
    let error = bad.mark_present(&early.range()).unwrap_err();
    assert!(error.to_string().ends_with("download them again"), "{error}");
    assert!(good.mark_present(&(8 * BLOCK..9 * BLOCK)).is_err(), "another process's as well");
    good.commit().unwrap();
    bad.commit().expect("nothing is left to commit");
    assert_eq!(durable_bytes(&dir), BLOCK);
    fill(&good, BLOCK..2 * BLOCK);
    good.commit().unwrap();
    assert_eq!(durable_bytes(&dir), 2 * BLOCK);
}

/// Protects: blocks of a process that was killed before its commit do not stay without one while
/// other processes use the object: the next commit finds out whether they are on the disk.
#[test]
fn blocks_of_a_killed_process_are_committed_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let object = || open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let killed = object();
    fill(&killed, 0..BLOCK);
    let next = object();
    next.commit().unwrap();
    assert_eq!(durable_bytes(&dir), BLOCK);
    fill(&killed, BLOCK..2 * BLOCK);
    // fdatasync fails on this device.
    let bad = on_data(&dir, "/dev/null");
    bad.commit().unwrap_err();
    assert_eq!(next.next_missing(0, u64::MAX).unwrap(), Some(BLOCK..SIZE));
}

/// Protects: if a process is killed in the middle of a commit, the error that it may have seen is
/// not forgotten. A process that had the data open before learns it by itself; one that has opened
/// it later keeps its own blocks only.
#[test]
fn a_commit_that_was_cut_off_loses_what_was_not_durable() {
    let dir = tempfile::tempdir().unwrap();
    let object = || open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let (killed, early) = (object(), object());
    let key = crate::pin::cache_key(&url(), &pin(SIZE));
    let map = std::fs::File::options()
        .read(true)
        .write(true)
        .open(dir.path().join(format!("cache/{key}.map")))
        .unwrap();
    // From now on it leaves the blocks of others alone.
    early.commit().unwrap();
    fill(&killed, 0..BLOCK);
    map::write_syncing(&map, true).unwrap();
    let late = object();
    assert!(late.is_present(&(0..BLOCK)).unwrap(), "a commit may be going on");
    fill(&early, BLOCK..2 * BLOCK);
    early.commit().unwrap();
    assert_eq!((durable_bytes(&dir), late.present_bytes().unwrap()), (BLOCK, 2 * BLOCK));
    assert!(!map::read_header(&map, SIZE).unwrap().syncing);

    fill(&late, 2 * BLOCK..3 * BLOCK);
    map::write_syncing(&map, true).unwrap();
    let claimed = got(killed.claim(&(5 * BLOCK..6 * BLOCK)).unwrap());
    late.commit().unwrap();
    assert_eq!(late.next_missing(0, u64::MAX).unwrap(), Some(0..BLOCK));
    assert_eq!((durable_bytes(&dir), late.present_bytes().unwrap()), (2 * BLOCK, 2 * BLOCK));
    let error = killed.mark_present(&claimed.range()).unwrap_err();
    assert_eq!(error.kind(), host::ErrorKind::Busy, "{error}");

    // Nothing to commit, but something to find out.
    fill(&early, 3 * BLOCK..4 * BLOCK);
    map::write_syncing(&map, true).unwrap();
    object().commit().unwrap();
    assert_eq!(early.present_bytes().unwrap(), 2 * BLOCK);
    assert!(!map::read_header(&map, SIZE).unwrap().syncing);
    // Now that a commit was carried to its end, this one sees errors like the others.
    fill(&early, 3 * BLOCK..4 * BLOCK);
    fill(&late, 4 * BLOCK..5 * BLOCK);
    map::write_syncing(&map, true).unwrap();
    late.commit().unwrap();
    assert_eq!((durable_bytes(&dir), early.present_bytes().unwrap()), (3 * BLOCK, 4 * BLOCK));
}

/// Protects: a full file system is reported as such.
#[test]
fn a_full_file_system_is_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let _object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let full = on_data(&dir, "/dev/full");
    let _claimed = got(full.claim(&(0..BLOCK)).unwrap());
    let error = full.write_at(0, &bytes(0..BLOCK)).unwrap_err();
    assert_eq!(error.kind(), host::ErrorKind::NoSpace, "{error}");
}

/// Protects: files that do not fit together are never read. An object that nobody uses becomes
/// empty, one that is in use is refused.
#[test]
fn damaged_objects_start_empty() {
    type Damage<'a> = &'a dyn Fn(&std::path::Path, &std::path::Path);
    let set_len = |path: &std::path::Path, len| {
        std::fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
    };
    let damages: [(&str, Damage<'_>); 8] = [
        ("magic", &|_, map| poke(map, 0, b"X")),
        ("size", &|_, map| poke(map, 16, &(SIZE + 1).to_be_bytes())),
        ("block size", &|_, map| poke(map, 12, &1u32.to_be_bytes())),
        ("short map", &|_, map| set_len(map, map::HEADER + 10)),
        ("long map", &|_, map| set_len(map, map::HEADER + 12)),
        ("short data", &|data, _| set_len(data, SIZE - 1)),
        ("long data", &|data, _| set_len(data, SIZE + 1)),
        ("no data", &|data, _| std::fs::remove_file(data).unwrap()),
    ];
    let key = crate::pin::cache_key(&url(), &pin(SIZE));
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let at = |suffix: &str| dir.path().join(format!("cache/{key}{suffix}"));
        let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
        fill(&object, 0..SIZE);
        object.commit().unwrap();
        let used = reader(&object);
        drop(object);
        damage(&at(".data"), &at(".map"));
        let error = open(&dir).object(&url(), &pin(SIZE)).unwrap_err();
        assert_eq!(error.kind(), host::ErrorKind::Corrupt, "{what}: {error}");
        drop(used);
        assert!(open(&dir).find(&url(), &pin(SIZE)).unwrap().is_none(), "{what}");
        let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
        assert_eq!(object.present_bytes().unwrap(), 0, "{what}");
        fill(&object, 0..SIZE);
        let mut buf = vec![0; SIZE as usize];
        reader(&object).read_at(0, &mut buf).unwrap();
        assert!(buf == bytes(0..SIZE), "{what}");
    }
}

fn poke(path: &std::path::Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    map::write_all_at(&file, offset, bytes).unwrap();
}

/// Protects: data whose map is gone is not read.
#[test]
fn data_without_a_map_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let key = crate::pin::cache_key(&url(), &pin(SIZE));
    fill(&open(&dir).object(&url(), &pin(SIZE)).unwrap(), 0..SIZE);
    std::fs::remove_file(dir.path().join(format!("cache/{key}.map"))).unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let mut buf = [1; 100];
    object.read_at(0, &mut buf).unwrap();
    assert_eq!((object.present_bytes().unwrap(), buf), (0, [0; 100]));
}

/// Protects: a reader refuses files that do not belong together.
#[test]
fn a_reader_checks_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let files = || object.files_for_reader().unwrap();
    let (data, map) = files();
    assert!(CacheReader::new(data, map, SIZE + 1).is_err());
    let (data, map) = files();
    assert!(CacheReader::new(map, data, SIZE).is_err());
    let (data, _) = files();
    assert!(CacheReader::new(data.try_clone().unwrap(), data, SIZE).is_err());
    let (data, map) = files();
    let (other, _) =
        CacheObject::anonymous(dir.path(), SIZE + 1).unwrap().files_for_reader().unwrap();
    assert!(CacheReader::new(other, map, SIZE).is_err());
    assert!(CacheReader::new(data, files().1, SIZE).is_ok());
    let reader = reader(&object);
    assert_eq!(reader.read_at(SIZE - 1, &mut [0; 2]).unwrap_err().raw_os_error(), Some(5));
}

/// Protects: the least recently used objects go first, and none that is in use, be it by a fetcher
/// or only by a reader. All files of an object go.
#[test]
fn a_prune_removes_old_objects_that_are_not_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir);
    let sizes: Vec<u64> = (1..=5).map(|n| n * BLOCK).collect();
    let key = |size| crate::pin::cache_key(&url(), &pin(size));
    for (age, size) in sizes.iter().enumerate() {
        fill(&cache.object(&url(), &pin(*size)).unwrap(), 0..*size);
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(100 - age as u64);
        let at = |suffix: &str| dir.path().join(format!("cache/{}{suffix}", key(*size)));
        std::fs::write(at(".sums"), vec![1; 5000]).unwrap();
        let json = std::fs::File::options().write(true).open(at(".json")).unwrap();
        json.set_modified(then).unwrap();
    }
    let fetcher = cache.object(&url(), &pin(sizes[0])).unwrap();
    let served = reader(&cache.object(&url(), &pin(sizes[1])).unwrap());
    let facts = cache.list().unwrap();
    assert_eq!(facts.len(), 5);
    for fact in &facts {
        let pin = fact.pin.clone().unwrap();
        assert_eq!(fact.name.as_deref(), Some("s3://golden/base.raw"));
        assert_eq!((fact.key.clone(), fact.present_bytes), (key(pin.size), pin.size));
        assert!(fact.allocated_bytes >= pin.size + 5000, "{fact:?}");
        assert_eq!(fact.in_use, pin.size <= sizes[1], "{fact:?}");
    }
    let total: u64 = facts.iter().map(|fact| fact.allocated_bytes).sum();
    assert_eq!(cache.prune(total).unwrap(), Pruned { objects: 0, bytes: 0, left: total });
    let pruned = cache.prune(total - 1).unwrap();
    assert_eq!((pruned.objects, pruned.left + pruned.bytes), (1, total));
    let left = |cache: &CacheDirectory| -> BTreeSet<u64> {
        cache.list().unwrap().iter().map(|fact| fact.pin.clone().unwrap().size).collect()
    };
    assert_eq!(left(&cache), BTreeSet::from([sizes[0], sizes[1], sizes[3], sizes[4]]));
    assert_eq!(cache.remove(&key(sizes[1])).unwrap_err().kind(), host::ErrorKind::Busy);
    assert_eq!(cache.remove(&key(sizes[2])).unwrap_err().kind(), host::ErrorKind::NotFound);
    assert_eq!(cache.remove("../x").unwrap_err().kind(), host::ErrorKind::NotFound);
    cache.remove(&key(sizes[3])).unwrap();
    assert_eq!(cache.prune(0).unwrap().objects, 1);
    assert_eq!(left(&cache), BTreeSet::from([sizes[0], sizes[1]]));
    drop((fetcher, served));
    let limited = CacheDirectory::open(&dir.path().join("cache"), Some(1)).unwrap();
    let pruned = limited.prune_to_limit().unwrap();
    assert_eq!((pruned.objects, pruned.left), (2, 0));
    assert_eq!(std::fs::read_dir(dir.path().join("cache")).unwrap().count(), 0);
    // What is left of an object that lost its map is removed as well.
    std::fs::write(dir.path().join(format!("cache/{}.data", key(1))), "x").unwrap();
    assert_eq!(cache.prune(0).unwrap().objects, 1);
    assert_eq!(std::fs::read_dir(dir.path().join("cache")).unwrap().count(), 0);
}

/// Protects: forgotten blocks are absent for all, and can be downloaded again. In an object without
/// a name, blocks can be punched, but not while they are downloaded.
#[test]
fn blocks_can_be_forgotten_and_punched() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(SIZE)).unwrap();
    let serving = reader(&object);
    fill(&object, 0..SIZE);
    object.commit().unwrap();
    assert!(serving.is_present(&(0..SIZE)).unwrap());
    object.forget(&(BLOCK + 1..BLOCK + 2)).unwrap();
    assert_eq!(object.next_missing(0, u64::MAX).unwrap(), Some(BLOCK..2 * BLOCK));
    serving.forget(&(BLOCK..BLOCK + 1));
    assert!(!serving.is_present(&(0..SIZE)).unwrap());
    fill(&object, BLOCK..2 * BLOCK);
    assert!(serving.is_present(&(0..SIZE)).unwrap());
    assert!(object.punch(&(0..SIZE)).is_err(), "others may be reading");

    let object = CacheObject::anonymous(dir.path(), SIZE).unwrap();
    let serving = reader(&object);
    fill(&object, 0..5 * BLOCK);
    object.commit().unwrap();
    let _claimed = got(object.claim(&(8 * BLOCK..9 * BLOCK)).unwrap());
    assert!(serving.is_present(&(0..5 * BLOCK)).unwrap());
    assert!(!object.punch(&(4 * BLOCK..9 * BLOCK)).unwrap());
    assert!(object.punch(&(BLOCK - 1..3 * BLOCK + 1)).unwrap());
    serving.forget(&(BLOCK..3 * BLOCK));
    assert_eq!(object.next_missing(0, u64::MAX).unwrap(), Some(BLOCK..3 * BLOCK));
    assert!(!serving.is_present(&(0..5 * BLOCK)).unwrap());
    assert!(serving.is_present(&(3 * BLOCK..5 * BLOCK)).unwrap());
    let mut buf = vec![1; 4 * BLOCK as usize];
    serving.read_at(0, &mut buf).unwrap();
    buf[BLOCK as usize..3 * BLOCK as usize].iter().for_each(|byte| assert_eq!(*byte, 0));
    assert!(buf[3 * BLOCK as usize..] == bytes(3 * BLOCK..4 * BLOCK));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the cache has a name");
}

/// Protects: only directories that no other user can change are used, and only this user reads what
/// is in them.
#[test]
fn directories_of_others_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/cache");
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let cache = CacheDirectory::open(&path, None).unwrap();
    assert_eq!(mode(&path), 0o700);
    let _object = cache.object(&url(), &pin(SIZE)).unwrap();
    for file in std::fs::read_dir(&path).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
    for (changed, bits, refused) in [
        ("a/b/cache", 0o777, true),
        ("a/b/cache", 0o1777, true),
        ("a/b/cache", 0o720, true),
        ("a/b/cache", 0o755, false),
        ("a/b", 0o777, true),
        ("a/b", 0o1777, false),
        ("a/b", 0o755, false),
    ] {
        let changed = dir.path().join(changed);
        std::fs::set_permissions(&changed, PermissionsExt::from_mode(bits)).unwrap();
        let opened = CacheDirectory::open(&path, None);
        assert_eq!(opened.is_err(), refused, "{}: {bits:o}", changed.display());
        if let Err(error) = opened {
            assert_eq!(error.kind(), host::ErrorKind::PermissionDenied);
            assert!(error.to_string().contains("use a directory of your own"), "{error}");
        }
    }
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(CacheDirectory::open(&file, None).is_err());
}

/// Protects: of many threads that want the same blocks, one downloads each block.
#[test]
fn threads_download_each_block_once() {
    let dir = tempfile::tempdir().unwrap();
    let objects = [
        open(&dir).object(&url(), &pin(SIZE)).unwrap(),
        open(&dir).object(&url(), &pin(SIZE)).unwrap(),
    ];
    let downloads: Vec<std::sync::atomic::AtomicU64> = (0..11).map(|_| 0.into()).collect();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (object, downloads) = (&objects[thread % 2], &downloads);
            scope.spawn(move || {
                let most = BLOCK * (1 + thread as u64 % 3);
                while let Some(missing) = object.next_missing(0, u64::MAX).unwrap() {
                    let missing = missing.start..missing.end.min(missing.start + most);
                    let Claim::Got(claimed) = object.claim(&missing).unwrap() else {
                        std::thread::yield_now();
                        continue;
                    };
                    let end = claimed.range().end;
                    let mut from = claimed.range().start;
                    while let Some(run) = object.next_missing(from, end - from).unwrap() {
                        if run.start >= end {
                            break;
                        }
                        for block in blocks_around(&run) {
                            downloads[block as usize]
                                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                        object.write_at(run.start, &bytes(run.clone())).unwrap();
                        object.mark_present(&run).unwrap();
                        from = run.end;
                        if from >= end {
                            break;
                        }
                    }
                    object.commit().unwrap();
                }
            });
        }
    });
    let downloads: Vec<u64> =
        downloads.into_iter().map(std::sync::atomic::AtomicU64::into_inner).collect();
    assert_eq!(downloads, [1; 11]);
    let mut buf = vec![0; SIZE as usize];
    reader(&objects[0]).read_at(0, &mut buf).unwrap();
    assert!(buf == bytes(0..SIZE));
    assert_eq!(durable_bytes(&dir), SIZE);
}

/// Protects: the empty file, and sizes that no map can have.
#[test]
fn sizes_at_the_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let object = open(&dir).object(&url(), &pin(0)).unwrap();
    assert_eq!((object.next_missing(0, 1).unwrap(), object.present_bytes().unwrap()), (None, 0));
    assert!(reader(&object).is_present(&(0..0)).unwrap());
    for size in [LARGEST_FILE + 1, u64::MAX] {
        let error = open(&dir).object(&url(), &pin(size)).unwrap_err();
        assert_eq!(error.kind(), host::ErrorKind::UnsupportedFeature, "{error}");
        assert!(CacheObject::anonymous(dir.path(), size).is_err());
    }
}

/// One step of the model test.
#[derive(Clone, Debug)]
enum Step {
    Fill(Range<u64>),
    Forget(Range<u64>),
    Commit,
    Reboot,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    let range = || (0..SIZE, 0..4 * BLOCK).prop_map(|(start, len)| start..(start + len).min(SIZE));
    prop_oneof![
        4 => range().prop_map(Step::Fill),
        1 => range().prop_map(Step::Forget),
        1 => Just(Step::Commit),
        1 => Just(Step::Reboot),
    ]
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

    /// Protects: the states of blocks are those of a plain list after any steps, and present blocks
    /// have their bytes. A reboot here is a kill: the object is not closed but left open on a copy
    /// of the files.
    #[test]
    fn states_follow_the_model(steps in proptest::collection::vec(step(), 1..25)) {
        let content = bytes(0..SIZE);
        let content = |range: &Range<u64>| &content[range.start as usize..range.end as usize];
        let dir = tempfile::tempdir().unwrap();
        let mut boots = 0u64;
        let at = |boots: u64| dir.path().join(format!("cache{boots}"));
        let boot = |boots: u64| format!("{boots:036x}").into_bytes().try_into().unwrap();
        let open = |boots| CacheDirectory::open_in_boot(&at(boots), None, boot(boots)).unwrap();
        let mut object = open(0).object(&url(), &pin(SIZE)).unwrap();
        let mut model = [0u8; 11];
        for step in steps {
            match step {
                Step::Fill(range) => {
                    if let Claim::Got(claimed) = object.claim(&range).unwrap() {
                        let range = claimed.range();
                        object.write_at(range.start, content(&range)).unwrap();
                        object.mark_present(&range).unwrap();
                    }
                    for block in blocks_around(&range) {
                        model[block as usize] = model[block as usize].max(1);
                    }
                }
                Step::Forget(range) => {
                    object.forget(&range).unwrap();
                    blocks_around(&range).for_each(|block| model[block as usize] = 0);
                }
                Step::Commit => {
                    object.commit().unwrap();
                    model.iter_mut().for_each(|state| *state *= 2 - *state / 2);
                }
                Step::Reboot => {
                    std::fs::create_dir(at(boots + 1)).unwrap();
                    for file in std::fs::read_dir(at(boots)).unwrap() {
                        let file = file.unwrap();
                        std::fs::copy(file.path(), at(boots + 1).join(file.file_name())).unwrap();
                    }
                    let key = crate::pin::cache_key(&url(), &pin(SIZE));
                    let data = at(boots + 1).join(format!("{key}.data"));
                    for (block, state) in (0..).zip(&mut model) {
                        if *state != 2 {
                            *state = 0;
                            let bytes = bytes_of(&(block..block + 1), SIZE);
                            poke(&data, bytes.start, &vec![0; (bytes.end - bytes.start) as usize]);
                        }
                    }
                    boots += 1;
                    object = open(boots).object(&url(), &pin(SIZE)).unwrap();
                }
            }
            let reader = reader(&object);
            let mut durable = 0;
            for (block, state) in (0..).zip(model) {
                let range = bytes_of(&(block..block + 1), SIZE);
                proptest::prop_assert_eq!(reader.is_present(&range).unwrap(), state > 0);
                proptest::prop_assert_eq!(object.is_present(&range).unwrap(), state > 0);
                durable += if state == 2 { range.end - range.start } else { 0 };
                if state > 0 {
                    let mut buf = vec![0; (range.end - range.start) as usize];
                    reader.read_at(range.start, &mut buf).unwrap();
                    proptest::prop_assert!(buf == content(&range));
                }
            }
            let facts = open(boots).list().unwrap();
            proptest::prop_assert_eq!(facts[0].durable_bytes, durable);
            let missing = object.next_missing(0, u64::MAX).unwrap().map(|range| range.start / BLOCK);
            proptest::prop_assert_eq!(missing, (0..).zip(model).find(|(_, state)| *state == 0).map(|(block, _)| block));
        }
    }
}
