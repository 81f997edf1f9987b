//! A file that fails on demand: `nbdkit` serves it, `nbdfuse` mounts it as a file, and its
//! operations fail while a flag file exists.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{Scratch, mounts, poll};

/// The operations that fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Reads that touch the bad range.
    Read,
    /// Every write.
    Write,
    /// Every flush.
    Flush,
}

/// The file of an `nbdfuse` mount. Needs the programs `nbdkit` and `nbdfuse`.
#[derive(Debug)]
pub struct NbdFile {
    path: PathBuf,
    below: PathBuf,
    flags: PathBuf,
    server: Child,
}

impl NbdFile {
    /// Serves `content` as `SCRATCH/NAME`; reads fail inside `bad`.
    pub fn serve(scratch: &Scratch, name: &str, content: &[u8], bad: &Range<u64>) -> NbdFile {
        let path = scratch.write(name, b"");
        let below = scratch.write(&format!("{name}.below"), content);
        let flags = scratch.dir(&format!("{name}.flags"));
        let size = content.len();
        let (file, flag) = (below.display(), flags.display());
        let fails = "{ echo EIO bad >&2; exit 1; }";
        // In the script of nbdkit, `$3` is the count and `$4` the offset.
        let read = format!(
            "if [ -f {flag}/Read ] && [ $4 -lt {} ] && [ $(( $4 + $3 )) -gt {} ]; then {fails}; fi; \
             dd if={file} skip=$4 count=$3 iflag=skip_bytes,count_bytes,fullblock bs=64k status=none",
            bad.end, bad.start
        );
        let write = format!(
            "if [ -f {flag}/Write ]; then {fails}; fi; dd of={file} seek=$4 oflag=seek_bytes iflag=fullblock conv=notrunc bs=64k status=none"
        );
        let mut command = Command::new("nbdfuse");
        command.arg(&path).args(["[", "nbdkit", "eval", &format!("get_size=echo {size}")]);
        command.args([
            format!("pread={read}"),
            format!("pwrite={write}"),
            format!("flush=if [ -f {flag}/Flush ]; then {fails}; fi"),
        ]);
        let server = command.arg("]").stdin(Stdio::null()).spawn().expect("nbdfuse");
        let served = NbdFile { path, below, flags, server };
        let there =
            || fs::metadata(&served.path).is_ok_and(|meta| meta.len() == size as u64).then_some(());
        assert!(poll(Duration::from_secs(20), there).is_some(), "nbdfuse does not serve");
        served
    }

    /// The mounted file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that is served: it never fails, so the test can read it afterwards.
    pub fn below(&self) -> &Path {
        &self.below
    }

    pub fn fail(&self, fault: Fault) {
        fs::write(self.flags.join(format!("{fault:?}")), b"").expect("flag");
    }

    pub fn repair(&self, fault: Fault) {
        fs::remove_file(self.flags.join(format!("{fault:?}"))).expect("flag");
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        if mounts::at(&self.path).is_some() {
            mounts::detach(&self.path);
        }
        // nbdfuse ends by itself once its mount is gone, and ends nbdkit.
        if poll(Duration::from_secs(10), || self.server.try_wait().ok().flatten()).is_none() {
            let _ = self.server.kill();
            let _ = self.server.wait();
        }
    }
}
