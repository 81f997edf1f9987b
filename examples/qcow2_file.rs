//! `qcow2_file IMAGE`: uses the crate `qcow2` as a virtual machine monitor does. Creates the image
//! IMAGE of 64 MiB, which must not exist yet, writes to it from two threads, discards a part,
//! flushes, closes, checks, and reads again.

use std::path::Path;
use std::sync::Arc;

use qcow2::Qcow2;
use qcow2::host::Result;
use qcow2::host::storage::{Access, FileStorage};

const MIB: u64 = 1 << 20;

fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).expect("usage: qcow2_file IMAGE");
    let path = Path::new(&path);
    let disk = Qcow2::create(Arc::new(FileStorage::create_new(path)?), 64 * MIB, 65536)?;
    std::thread::scope(|scope| {
        let write = |at, byte| disk.write_at(at, &vec![byte; 2 << 20]);
        let other = scope.spawn(move || write(32 * MIB, 0xbb));
        write(4096, 0xaa)?;
        other.join().expect("no panic")
    })?;
    disk.discard(33 * MIB..34 * MIB)?; // reads as zero now
    disk.flush()?; // durable now
    disk.close()?;

    let file = Arc::new(FileStorage::open(path, Access::ReadWrite)?);
    let report = Qcow2::check(&*file)?;
    let disk = Qcow2::open(file)?;
    let mut bytes = [0; 2];
    disk.read_at(33 * MIB - 1, &mut bytes)?;
    println!(
        "{} corruptions, {} leaks, {bytes:02x?} around 33 MiB",
        report.corruptions, report.leaks
    );
    disk.close()
}
