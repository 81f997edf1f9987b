//! Power cuts at any write: leaks at worst.

use super::refcount_growth::{small, small_data};
use super::*;

/// What each cluster may read as after a power cut: its value at the last flush, or any later one (P4).
struct Allowed(Vec<Vec<u8>>);

impl Allowed {
    /// Opens what the cut left and looks at all of it (2.5). One cluster is one sector, so none is torn.
    fn check(&self, bytes: Vec<u8>, what: &str) {
        let memory = Arc::new(Memory { state: parking_lot::Mutex::new(MemoryState { bytes, ..MemoryState::default() }) });
        let image = Image::open(memory.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut seen = std::collections::HashSet::new();
        for (cluster, allowed) in self.0.iter().enumerate() {
            let at = GuestOffset(cluster as u64 * 512);
            // Every host cluster that is named was checked to be counted and no metadata when its table was loaded.
            let extent = image.map(at, 512).unwrap_or_else(|error| panic!("{what}: {error}"));
            if let Mapping::Data { host, .. } | Mapping::Zero { reserved: Some((host, _)) } = extent.mapping {
                assert!(seen.insert(host), "{what}: {host:?} is named twice");
            }
            let mut buf = [0; 512];
            image.read_extent(at, &extent, &mut buf).unwrap();
            assert!(buf == [buf[0]; 512] && allowed.contains(&buf[0]), "{what}: cluster {cluster} reads {}, allowed {allowed:?}", buf[0]);
        }
        let header = image.reader().header();
        let mut tables = vec![0; header.l1_size as usize * 8 + header.refcount_table_clusters as usize * 512];
        let (l1, refcounts) = tables.split_at_mut(header.l1_size as usize * 8);
        memory.read_at(header.l1_table_offset, l1).unwrap();
        memory.read_at(header.refcount_table_offset, refcounts).unwrap();
        let named = tables.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().unwrap()) & !(1 << 63)).filter(|at| *at != 0);
        let own = [header.l1_table_offset, header.refcount_table_offset, 0];
        for at in named.chain(own) {
            assert_ne!(
                image.allocator.refcount(crate::format::HostCluster(at / 512)).unwrap(),
                0,
                "{what}: metadata at {at:#x} is not counted"
            );
        }
        // Leaks at worst, and the next one who opens it gives them back.
        memory.state.lock().open = true;
        let report = check(&*memory).unwrap();
        assert!(report.is_sound(), "{what}: {:?}", report.findings);
        let again = reopen(memory.clone());
        again.image.close().unwrap();
        let report = check(&*memory).unwrap();
        assert!(report.is_sound() && report.leaks == 0, "{what}: {:?}", report.findings);
    }
}

/// P4: stores, overwrites, discards, zeroes and flushes, with writes that fail now and then, and a power cut at any write.
#[test]
fn power_cuts_leave_leaks_at_worst() {
    let seed = std::env::var("CORDISK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1u64);
    let runs: u64 = std::env::var("CORDISK_CUTS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(30);
    let bench = small();
    // Close to where the refcount table has to move.
    bench.store_small(0..3900).unwrap();
    bench.image.close().unwrap();
    let start = bench.memory.state.lock().bytes.clone();
    for run in seed..seed + runs {
        let what = format!("CORDISK_SEED={run} CORDISK_CUTS=1");
        let mut random = run.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        next_random(&mut random);
        let mut state = MemoryState { bytes: start.clone(), ..MemoryState::default() };
        let cut_in = next_random(&mut random) as usize % 200;
        state.power = Some(Power { durable: start.clone(), unsynced: Vec::new(), cut_in, random, after_cut: None });
        let bench = reopen(Arc::new(Memory { state: parking_lot::Mutex::new(state) }));
        let mut allowed = Allowed((0..9000).map(|cluster| vec![if cluster < 3900 { small_data(cluster)[0] } else { 0 }]).collect());
        loop {
            let first = next_random(&mut random) % 8990;
            let clusters = first..(first + 1 + next_random(&mut random) % 200).min(9000);
            let fails = next_random(&mut random).is_multiple_of(4);
            if fails {
                bench.memory.state.lock().writes_left = Some(next_random(&mut random) as usize % 12);
            }
            let held = bench.lock.exclusive(clusters.start * 512..clusters.end * 512);
            let guests = GuestCluster(clusters.start)..GuestCluster(clusters.end);
            let mut allow = |byte: u8| clusters.clone().for_each(|cluster| allowed.0[cluster as usize].push(byte));
            let mut flushed = false;
            match next_random(&mut random) % 8 {
                0..=2 => {
                    let byte = next_random(&mut random) as u8;
                    allow(byte);
                    let store = || -> Result<()> {
                        let mut at = clusters.start;
                        while at < clusters.end {
                            let allocation = bench.image.allocate(clusters.end - at)?;
                            let count = allocation.clusters();
                            let filled = bench.image.fill(allocation, &vec![byte; count as usize * 512])?;
                            bench.image.publish(&held, GuestCluster(at), filled)?;
                            at += count;
                        }
                        Ok(())
                    };
                    let _ = store();
                }
                3 => {
                    let byte = next_random(&mut random) as u8;
                    allow(byte);
                    for cluster in clusters.clone() {
                        let at = GuestOffset(cluster * 512);
                        let extent = bench.image.map(at, 512).unwrap();
                        match extent.mapping {
                            Mapping::Data { in_place: true, .. } => drop(bench.image.write_in_place(at, &extent, &[byte; 512])),
                            Mapping::Zero { reserved: Some((host, true)) } if bench.image.fill_reserved(host, &[byte; 512]).is_ok() => {
                                let _ = bench.image.publish_reserved(&held, GuestCluster(cluster)..GuestCluster(cluster + 1));
                            }
                            _ => {}
                        }
                    }
                }
                4 => {
                    allow(0);
                    let _ = bench.image.discard(&held, guests);
                }
                5 => {
                    allow(0);
                    let _ = bench.image.zero(&held, guests);
                }
                _ => flushed = bench.image.flush().is_ok(),
            }
            drop(held);
            bench.memory.state.lock().writes_left = None;
            let after_cut = bench.memory.state.lock().power.as_mut().unwrap().after_cut.take();
            if let Some(bytes) = after_cut {
                allowed.check(bytes, &what);
                break;
            }
            if flushed {
                for (cluster, allowed) in allowed.0.iter_mut().enumerate() {
                    let at = GuestOffset(cluster as u64 * 512);
                    let extent = bench.image.map(at, 512).unwrap();
                    let mut buf = [0; 512];
                    bench.image.read_extent(at, &extent, &mut buf).unwrap();
                    assert!(allowed.contains(&buf[0]), "{what}: cluster {cluster}");
                    *allowed = vec![buf[0]];
                }
            }
        }
    }
}
