//! The examples do what their documentation says.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Scratch, run_ok};

/// Cargo builds the examples of a package together with its tests.
fn example(name: &str) -> PathBuf {
    Path::new(crate::support::CORDISK).parent().expect("a directory").join("examples").join(name)
}

/// Protects: the crate `qcow2` alone makes an image that QEMU reads as the example wrote it, and in
/// which QEMU finds no error.
#[test]
fn qemu_reads_the_image_of_the_example() {
    let program = example("qcow2_file");
    requires!("qemu-img", program.to_str().expect("UTF-8"));
    let scratch = Scratch::new();
    let (image, raw) = (scratch.join("disk.qcow2"), scratch.join("disk.raw"));
    let said = run_ok(Command::new(program).arg(&image));
    assert_eq!(said, "0 corruptions, 0 leaks, [bb, 00] around 33 MiB\n");
    run_ok(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image));
    run_ok(
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).args([&image, &raw]),
    );
    let bytes = std::fs::read(raw).expect("converted");
    let mut wanted = vec![0; 64 << 20];
    wanted[4096..4096 + (2 << 20)].fill(0xaa);
    wanted[32 << 20..33 << 20].fill(0xbb);
    assert!(bytes == wanted);
}
