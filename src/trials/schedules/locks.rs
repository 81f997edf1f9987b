//! The range lock alone: exclusion, order of arrival, and progress of every waiter.

use std::sync::Mutex as Unseen;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;

/// Size of a stripe of the range lock, in bytes.
const STRIPE: u64 = 1 << 20;

/// Four tasks lock ranges that cross stripes. Conflicting ranges are never held at the same time,
/// and every task ends (H20, H28).
#[test]
fn schedules_of_the_range_lock() {
    explore(2, || {
        let lock = Arc::new(RangeLock::new(65536));
        // One counter for each half stripe: the number of readers, or -1 for a writer. These are
        // atomics of the standard library, so that the scheduler does not see them.
        let halves: Arc<Vec<AtomicI64>> = Arc::new((0..6).map(|_| AtomicI64::new(0)).collect());
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let (lock, halves) = (Arc::clone(&lock), Arc::clone(&halves));
                thread::spawn(move || {
                    for _ in 0..2 {
                        let start = below(6) as usize;
                        let end = (start + 1 + below(4) as usize).min(6);
                        let range = start as u64 * STRIPE / 2..end as u64 * STRIPE / 2;
                        use_range(&lock, &halves[start..end], range, below(3));
                    }
                })
            })
            .collect();
        tasks.into_iter().for_each(|task| task.join().unwrap());
        assert!(lock.try_shared(0..u64::MAX).is_some(), "somebody left an entry behind");
    });
}

fn use_range(lock: &RangeLock, halves: &[AtomicI64], range: Range<u64>, how: u64) {
    let read = || {
        halves.iter().for_each(|half| {
            assert!(half.fetch_add(1, Ordering::SeqCst) >= 0, "a reader beside a writer")
        });
        thread::yield_now();
        halves.iter().for_each(|half| assert!(half.fetch_sub(1, Ordering::SeqCst) > 0));
    };
    match how {
        0 => {
            let _guard = lock.shared(range);
            read();
        }
        1 => {
            if let Some(_guard) = lock.try_shared(range) {
                read();
            }
        }
        _ => {
            let guard = lock.exclusive(range.clone());
            assert!(guard.covers(&range));
            halves.iter().for_each(|half| {
                assert_eq!(half.swap(-1, Ordering::SeqCst), 0, "a writer beside somebody")
            });
            thread::yield_now();
            halves.iter().for_each(|half| half.store(0, Ordering::SeqCst));
        }
    }
}

/// A request that arrives while a writer waits gets its turn after that writer, even a reader that
/// could share with the current holder. So no writer starves.
#[test]
fn schedules_of_arrival_order() {
    explore(1, || {
        let lock = Arc::new(RangeLock::new(65536));
        let order: Arc<Unseen<Vec<&str>>> = Arc::default();
        let first = lock.shared(0..100);
        let enter = |who: &'static str, exclusive: bool| {
            let (lock, order) = (Arc::clone(&lock), Arc::clone(&order));
            thread::spawn(move || match exclusive {
                true => {
                    let _guard = lock.exclusive(50..2 * STRIPE);
                    order.lock().unwrap().push(who);
                }
                false => {
                    let _guard = lock.shared(0..60);
                    order.lock().unwrap().push(who);
                }
            })
        };
        let writer = enter("writer", true);
        while lock.waiting() < 1 {
            thread::yield_now();
        }
        let reader = enter("reader", false);
        let other = enter("other writer", true);
        for _ in 0..below(20) {
            thread::yield_now();
        }
        drop(first);
        [writer, reader, other].into_iter().for_each(|task| task.join().unwrap());
        assert_eq!(order.lock().unwrap()[0], "writer");
    });
}
