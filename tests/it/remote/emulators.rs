//! Disks above gs:// and az://, with emulators of Google's and Azure's object stores as servers.
//!
//! Where an emulator is not installed its test is skipped, also where all tools are required: the
//! gate installs them from the package registries of other languages, which may be away.

use test_servers::{Azurite, FakeGcs};

use super::servers::live;
use super::*;

const SIZE: u64 = 12 * MIB;

/// A base of an object store, and an overlay that is created.
fn above(url: &str, content: Vec<u8>, settings: &str) -> Remote {
    let remote = Remote::new(url, content);
    let text =
        format!("[[source]]\nprefix = \"{}\"\nallow-http = true\n{settings}", remote.prefix());
    remote.sources(&text).create()
}

/// An object of the emulator of Google, and an overlay that is created.
fn above_gcs() -> Option<(FakeGcs, Remote)> {
    let gcs = test_servers::fake_gcs()?;
    let content = content(SIZE);
    gcs.make_bucket("golden");
    gcs.put("golden", "base.raw", &content);
    let settings = format!("endpoint = \"{}\"\nanonymous = true\n", gcs.endpoint);
    let remote = above("gs://golden/base.raw", content, &settings);
    Some((gcs, remote))
}

/// Protects: an object of Google, pinned by its generation.
#[test]
fn a_disk_above_an_emulator_of_google() {
    requires!("/dev/fuse", "qemu-img", "curl");
    let Some((gcs, remote)) = above_gcs() else { return };
    live(&remote, "a_disk_above_an_emulator_of_google", || drop(gcs));
}

/// Protects: an object of Google that is replaced is not read, and its old bytes stay readable
/// where they are in the cache.
#[test]
fn an_emulator_of_google_replaces_the_object() {
    requires!("/dev/fuse", "qemu-img", "curl");
    let Some((gcs, remote)) = above_gcs() else { return };
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check(0..64 * KIB);
    gcs.put("golden", "base.raw", &vec![0x77; SIZE as usize]);
    let read = std::os::unix::fs::FileExt::read_at(&guest.file, &mut [0; 4096], 9 * MIB);
    assert_eq!(read.expect_err("the bytes are of another object").raw_os_error(), Some(5));
    guest.check(0..64 * KIB);
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// A blob of the emulator of Azure, with the key of the account from a file, and an overlay that is
/// created.
fn above_azure(size: u64) -> Option<(Azurite, Remote)> {
    let azurite = test_servers::azurite()?;
    let content = content(size);
    azurite.make_container("golden");
    azurite.put("golden", "images/base.raw", &content);
    let key = azurite.directory().join("key");
    fs::write(&key, Azurite::KEY).expect("key");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .expect("mode of the key");
    let settings = format!(
        "endpoint = \"{}\"\naccount = \"devstoreaccount1\"\naccount-key-file = \"{}\"\n",
        azurite.endpoint,
        key.display()
    );
    let remote = above("az://golden/images/base.raw", content, &settings);
    Some((azurite, remote))
}

/// Protects: a blob of Azure, with the key of the account from a file.
#[test]
fn a_disk_above_an_emulator_of_azure() {
    requires!("/dev/fuse", "qemu-img", "python3");
    let Some((azurite, remote)) = above_azure(SIZE) else { return };
    live(&remote, "a_disk_above_an_emulator_of_azure", || drop(azurite));
}

/// Protects: `--learn` leaves the order beside a blob of Azure. The emulator of Google takes no
/// objects in the way in which object_store writes them.
#[test]
fn a_machine_leaves_its_order_at_an_emulator_of_azure() {
    requires!("/dev/fuse", "qemu-img", "python3");
    let Some((_azurite, remote)) = above_azure(super::order::SIZE) else { return };
    super::order::learns(&remote);
}
