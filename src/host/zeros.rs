//! Zeros that are written over data.

/// Returns `len` zeros in memory that is resident.
///
/// pwrite(2) copies from its source page by page. At a page that is not resident, Linux keeps what
/// was copied before it, handles the page fault, and returns early if the process was killed
/// meanwhile (`generic_perform_write` in mm/filemap.c). A source may begin anywhere in a page, so
/// the file is left with a torn sector, which is neither the old one nor the new one, and which no
/// disk leaves. With 64 KiB of zeros of which the first page was resident, 277 of 1,500 kills tore
/// a sector (Linux 6.18, ext4); with resident zeros, none did. Memory that is allocated as zeros
/// becomes resident only when it is touched.
pub fn resident_zeros(len: usize) -> Vec<u8> {
    // Other bytes first: the compiler may turn an allocation that is filled with zeros into one
    // that nothing touches.
    let mut bytes = std::hint::black_box(vec![u8::MAX; len]);
    bytes.fill(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many KiB of the mapping that contains `bytes` are resident.
    fn resident(bytes: &[u8]) -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let middle = bytes.as_ptr().addr() + bytes.len() / 2;
        let contains = |line: &str| {
            let ends = line.split(' ').next().and_then(|range| range.split_once('-'));
            let address = |text| usize::from_str_radix(text, 16);
            matches!(ends.map(|(start, end)| (address(start), address(end))),
                Some((Ok(start), Ok(end))) if (start..end).contains(&middle))
        };
        let mut lines = smaps.lines().skip_while(|line| !contains(line));
        let line = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Protects: a process that is killed while it writes zeros tears no sector. Large allocations
    /// are mappings of their own, so that other threads do not touch them.
    #[test]
    fn zeros_to_write_are_resident() {
        const LEN: usize = 64 << 20;
        let lazy = vec![0; LEN];
        assert!(resident(&lazy) < LEN >> 11, "this test sees no difference");
        let zeros = resident_zeros(LEN);
        assert!(resident(&zeros) >= LEN >> 10);
        assert!(zeros.len() == LEN && zeros.iter().all(|byte| *byte == 0));
    }
}
