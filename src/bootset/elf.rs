//! What an ELF file needs to be run: its interpreter and its libraries.
//!
//! Only the beginning of the file, its dynamic section and its table of strings are read, each up
//! to a bound.

use object::Endianness;
use object::elf;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

use crate::failure::Step;

/// Bytes of the beginning, in which the program headers must be. A file has about a dozen, of 56
/// bytes each, behind the header of 64 bytes.
pub(crate) const HEAD: u64 = 4096;
/// Bytes of a dynamic section.
const MOST_DYNAMIC: u64 = 64 << 10;
/// Bytes of the longest name.
const LONGEST_NAME: u64 = 4096;
/// Libraries that one file names.
const MOST_NEEDED: usize = 512;

/// What a file needs.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct ElfNeeds {
    /// e_machine.
    pub(crate) machine: u16,
    /// Whether the file is of 64 bits.
    pub(crate) is_64bit: bool,
    /// The dynamic loader.
    pub(crate) interpreter: Option<String>,
    /// Names of libraries (DT_NEEDED).
    pub(crate) libraries: Vec<String>,
    /// Directories in which they are searched first (DT_RUNPATH, DT_RPATH).
    pub(crate) search: Vec<String>,
}

/// Reads bytes of the file: offset and length, or fewer at its end.
type ReadFile<'a> = &'a mut dyn FnMut(u64, u64) -> Step<Vec<u8>>;

/// Returns what the file that begins with `head` needs. `None`: it is no ELF file that can be read.
pub(crate) fn needs(head: &[u8], read: ReadFile<'_>) -> Step<Option<ElfNeeds>> {
    if !head.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    match head.get(4) {
        Some(1) => parse::<elf::FileHeader32<Endianness>>(head, read),
        Some(2) => parse::<elf::FileHeader64<Endianness>>(head, read),
        _ => Ok(None),
    }
}

fn parse<H: FileHeader<Endian = Endianness>>(
    head: &[u8],
    read: ReadFile<'_>,
) -> Step<Option<ElfNeeds>> {
    let Ok(header) = H::parse(head) else { return Ok(None) };
    let Ok(endian) = header.endian() else { return Ok(None) };
    let Ok(segments) = header.program_headers(endian, head) else { return Ok(None) };
    let mut needs = ElfNeeds {
        machine: header.e_machine(endian).0,
        is_64bit: header.is_type_64(),
        ..ElfNeeds::default()
    };
    let mut dynamic = Vec::new();
    for segment in segments {
        let kind = segment.p_type(endian);
        let (offset, size) = segment.file_range(endian);
        if kind == elf::PT_INTERP {
            needs.interpreter = Some(name(&read(offset, size.min(LONGEST_NAME))?));
        } else if kind == elf::PT_DYNAMIC {
            dynamic = read(offset, size.min(MOST_DYNAMIC))?;
        }
    }
    let size = size_of::<H::Dyn>();
    let whole = dynamic.len() / size * size;
    let entries = dynamic.get(..whole).map(object::pod::slice_from_all_bytes::<H::Dyn>);
    let Some(Ok(entries)) = entries else { return Ok(Some(needs)) };
    let entries = || entries.iter().take_while(|entry| entry.tag(endian) != elf::DT_NULL);
    let strings = entries().find(|entry| entry.tag(endian) == elf::DT_STRTAB);
    // Addresses become offsets by the segments that are loaded.
    let offset = strings.map(|entry| entry.val(endian)).and_then(|address| {
        let loaded = segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD);
        loaded
            .filter_map(|segment| {
                let start: u64 = segment.p_vaddr(endian).into();
                let (offset, len) = segment.file_range(endian);
                let within = address.checked_sub(start).filter(|&within| within < len)?;
                offset.checked_add(within)
            })
            .next()
    });
    let Some(offset) = offset else { return Ok(Some(needs)) };
    for entry in entries() {
        let tag = entry.tag(endian);
        let is_search = tag == elf::DT_RUNPATH || tag == elf::DT_RPATH;
        if tag != elf::DT_NEEDED && !is_search {
            continue;
        }
        let Some(at) = offset.checked_add(entry.val(endian)) else { continue };
        let string = name(&read(at, LONGEST_NAME)?);
        if is_search {
            needs.search.extend(string.split(':').map(str::to_owned));
        } else if needs.libraries.len() < MOST_NEEDED && !string.is_empty() {
            needs.libraries.push(string);
        }
    }
    Ok(Some(needs))
}

/// The string that ends at the first zero.
fn name(bytes: &[u8]) -> String {
    let end = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(end).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program of this test is an ELF file with libraries.
    #[test]
    fn the_running_program_needs_its_libraries() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let mut read = |offset: u64, len: u64| {
            let start = usize::try_from(offset).unwrap().min(bytes.len());
            let end = (start + usize::try_from(len).unwrap()).min(bytes.len());
            Ok(bytes[start..end].to_vec())
        };
        let needs = needs(&bytes[..4096], &mut read).unwrap().unwrap();
        assert!(needs.is_64bit, "{needs:?}");
        assert!(needs.interpreter.as_ref().unwrap().starts_with("/lib"), "{needs:?}");
        assert!(needs.libraries.iter().any(|name| name.starts_with("libc.so")), "{needs:?}");
    }

    /// Every byte of the beginning changed: an answer or none, and no panic.
    #[test]
    fn damaged_headers_end_in_an_answer() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        for at in 0..1024 {
            for value in [0x00, 0x01, 0x7f, 0xff] {
                let mut head = bytes[..4096].to_vec();
                head[at] = value;
                let mut read = |offset: u64, len: u64| {
                    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    let end = start.saturating_add(len).min(bytes.len());
                    Ok(bytes[start..end].to_vec())
                };
                let _ = needs(&head, &mut read).unwrap();
            }
        }
    }
}
