//! Tests of what other processes do during a commit.

use super::*;
use crate::cache::{BLOCK, CacheDirectory};
use crate::pin::{Pin, Validator};
use crate::url::SourceUrl;

const SIZE: u64 = 4 * BLOCK;

fn fill(object: &CacheObject, blocks: &Range<u64>) {
    let range = bytes_of(blocks, SIZE);
    let Claim::Got(_claim) = object.claim(&range).unwrap() else { panic!("no claim") };
    object.write_at(range.start, &vec![7; (range.end - range.start) as usize]).unwrap();
    object.mark_present(&range).unwrap();
}

/// A cache, and one file of it twice: two open objects have the locks that two processes have.
fn two_objects(dir: &tempfile::TempDir) -> (CacheDirectory, CacheObject, CacheObject) {
    let cache = CacheDirectory::open(&dir.path().join("cache"), None).unwrap();
    let url = SourceUrl::parse("s3://golden/base.raw").unwrap();
    let pin = Pin { size: SIZE, validator: Validator::Etag("\"1\"".into()), digest: None };
    let (one, other) = (cache.object(&url, &pin).unwrap(), cache.object(&url, &pin).unwrap());
    (cache, one, other)
}

/// Protects: bytes that are written during fdatasync(2) of another process, in place of forgotten
/// ones, do not become durable by it: it may have come too early for them.
#[test]
fn a_block_that_is_replaced_during_a_commit_is_not_made_durable_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, committing, other) = two_objects(&dir);
    let durable = || cache.list().unwrap()[0].durable_bytes;
    fill(&committing, &(0..2));
    let pending = std::mem::take(&mut *committing.0.pending.lock());
    assert_eq!((pending.len(), &pending[0]), (1, &(0..2)));

    let begun = committing.0.begin_commit(&pending).unwrap();
    rustix::fs::fdatasync(&committing.0.data).unwrap();
    other.forget(&(BLOCK..2 * BLOCK)).unwrap();
    fill(&other, &(1..2));
    assert!(!committing.0.end_commit(&begun).unwrap(), "blocks were forgotten");
    assert_eq!(durable(), 0, "what came after fdatasync became durable");

    // The next turn begins with the new counts.
    let begun = committing.0.begin_commit(&pending).unwrap();
    rustix::fs::fdatasync(&committing.0.data).unwrap();
    assert!(committing.0.end_commit(&begun).unwrap());
    assert_eq!(durable(), 2 * BLOCK);
}

/// Protects: the same, if the other process gives all non-durable blocks up because its own
/// fdatasync(2) has failed.
#[test]
fn a_loss_during_a_commit_is_seen_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, committing, other) = two_objects(&dir);
    fill(&committing, &(0..1));
    let pending = std::mem::take(&mut *committing.0.pending.lock());
    let begun = committing.0.begin_commit(&pending).unwrap();
    rustix::fs::fdatasync(&committing.0.data).unwrap();
    other.0.lose(&[]).unwrap();
    fill(&other, &(0..1));
    assert!(!committing.0.end_commit(&begun).unwrap());
    assert_eq!(cache.list().unwrap()[0].durable_bytes, 0);
}

/// Protects: the same, if the block was forgotten before the commit, and another process downloads
/// it during fdatasync(2).
#[test]
fn a_block_that_was_forgotten_before_a_commit_is_not_made_durable_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, committing, other) = two_objects(&dir);
    fill(&committing, &(0..2));
    other.forget(&(BLOCK..2 * BLOCK)).unwrap();
    let pending = std::mem::take(&mut *committing.0.pending.lock());
    let begun = committing.0.begin_commit(&pending).unwrap();
    rustix::fs::fdatasync(&committing.0.data).unwrap();
    fill(&other, &(1..2));
    assert!(committing.0.end_commit(&begun).unwrap());
    assert_eq!(cache.list().unwrap()[0].durable_bytes, BLOCK);
}
