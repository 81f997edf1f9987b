//! Rings without FUSE: what is handed to the kernel, and what happens where it does not take it.

use std::cell::Cell;

use super::*;

const SLOTS: usize = 4;

thread_local! {
    static ENTERED: Cell<usize> = const { Cell::new(0) };
}

/// A port to a file that knows no FUSE; `None` where there is no io_uring.
fn port() -> Option<Port> {
    let ring = ring(SLOTS as u32 + 1).inspect_err(|error| eprintln!("skipped: io_uring: {error}")).ok()?;
    let device = OwnedFd::from(File::open("/dev/null").unwrap());
    ENTERED.set(0);
    Some(Port::new(ring, std::os::fd::AsFd::as_fd(&device), 0, SLOTS).unwrap())
}

fn count() -> usize {
    ENTERED.replace(ENTERED.get() + 1)
}

#[test]
fn a_short_submit_is_an_error_and_frees_nothing_that_the_kernel_may_read() {
    let Some(mut port) = port() else { return };
    let error = port
        .register_by(|_, _| {
            count();
            Ok(0)
        })
        .unwrap_err();
    assert_eq!(error.to_string(), "the kernel does not take 4 of 4 entries");
    // The commands are in the ring still. Taken now, they find the memory that they name.
    assert_eq!(port.places.len(), SLOTS);
    assert_eq!(port.slots.iter().flatten().count(), SLOTS);
    for (place, entry) in port.places.iter().zip(&port.slots) {
        let entry = entry.as_ref().unwrap();
        assert_eq!((place[0].address, place[0].len), (entry.header.as_ptr().addr(), HEADER));
        assert_eq!((place[1].address, place[1].len), (entry.payload.as_ptr().cast::<u8>().addr(), MAX_IO));
    }
    assert_eq!(port.enter_by(enter, SLOTS).unwrap(), SLOTS);
    for _ in 0..SLOTS {
        assert!(matches!(port.next(), Ok(Some(Completion::Entry(..)))));
    }
}

#[test]
fn a_submit_in_parts_goes_on() {
    let Some(mut port) = port() else { return };
    // The first two tries take nothing.
    port.register_by(|ring, want| if count() < 2 { Ok(0) } else { enter(ring, want) }).unwrap();
    assert!(port.ring.submission().is_empty());
    assert_eq!(ENTERED.get(), 3);
}

#[test]
fn what_passes_is_tried_again_and_what_stays_is_an_error() {
    let Some(mut port) = port() else { return };
    let refused: Enter = |ring, want| match count() {
        0 => Err(Errno::AGAIN.into()),
        1 => Err(Errno::NOMEM.into()),
        2 => Err(Errno::BUSY.into()),
        _ => enter(ring, want),
    };
    port.register_by(refused).unwrap();
    assert_eq!(ENTERED.get(), 4);
    // With completions to be taken nothing is tried again before they are.
    port.enter_by(enter, SLOTS).unwrap();
    assert!(port.has_more());
    assert_eq!(port.enter_by(|_, _| Err(Errno::BUSY.into()), 1).unwrap(), 0);
    assert_eq!(port.enter_by(|_, _| Err(Errno::INTR.into()), 1).unwrap(), 0);
    assert!(port.enter_by(|_, _| Err(Errno::BADF.into()), 1).is_err());
}
