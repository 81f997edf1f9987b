//! Changing the backing reference: the whole change is one write inside sector 0, so that a crash leaves the old header or the new one.

use super::{BackingReference, Extensions, FormatError, Header, HeaderPatch, MAX_BACKING_NAME, V2_LENGTH, be32, be64, header_length};

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// backing_file_offset (8 bytes) and backing_file_size (4 bytes).
const BACKING_FIELDS: std::ops::Range<usize> = 8..20;

impl Header {
    /// Points the header to another backing file, or to none, keeping every other byte of header and extensions.
    ///
    /// The backing format extension goes or changes with the name. Only where the extensions are too long to be rewritten in one sector
    /// does a dropped name leave its format extension behind, which means nothing without a name.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] for a name that is empty, longer than 1023 bytes or has control characters, and where the first cluster
    /// has no room for the change as one sector write.
    pub fn with_backing(&self, backing: Option<&BackingReference>) -> Result<HeaderPatch, FormatError> {
        let old = self.serialised();
        let length = header_length(&old, self.geometry.version() >= 3)?;
        let extensions = Extensions::parse_again(&old, length, self.geometry.cluster_size() as usize)?;
        let mut new = old[..length].to_vec();
        new.extend(extensions.with_backing_format(&old, backing.and_then(|backing| backing.format)));
        let one_sector = new.len() <= SECTOR || (new.len() == old.len() && new[SECTOR..] == old[SECTOR..]);
        match backing {
            None => {
                if !one_sector {
                    if !extensions.terminated() {
                        return refuse("the header extensions lack an end marker and are too long to be given one");
                    }
                    new.clone_from(&old);
                }
                set_backing_fields(&mut new, 0, 0);
                Ok(self.patched(&old, new, &[], None, None))
            }
            Some(backing) => {
                let name = backing.name.as_bytes();
                if name.is_empty() || name.len() > MAX_BACKING_NAME || backing.name.chars().any(char::is_control) {
                    return refuse(&format!("backing file name of {} bytes is empty, too long or has control characters", name.len()));
                }
                if !one_sector {
                    return refuse("no room in the first 512 bytes for the header extensions with another backing format");
                }
                let in_sector = new.len() + name.len() <= SECTOR;
                let offset = if in_sector { new.len() } else { self.place(&old, new.len(), name.len())? };
                set_backing_fields(&mut new, offset as u64, name.len() as u32);
                let before = (!in_sector).then(|| (offset as u64, name.to_vec()));
                Ok(self.patched(&old, new, if in_sector { name } else { &[] }, before, Some(backing.clone())))
            }
        }
    }

    /// Header and extensions as they stand in the file now: the bytes read at open under the fields.
    fn serialised(&self) -> Vec<u8> {
        let mut bytes = self.area.0.clone();
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        // A size that is no multiple of 512 stays as it is unless the disk was resized.
        let size = be64(&self.area.0, 24);
        if size - size % super::GUEST_SECTOR != self.geometry.size() {
            put(24, &self.geometry.size().to_be_bytes());
        }
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_table_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.nb_snapshots.to_be_bytes());
        if self.geometry.version() >= 3 {
            put(V2_LENGTH, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
        }
        bytes
    }

    /// A place in the first cluster for a name of `len` bytes, outside sector 0, clear of extensions and the old name, which live until
    /// the patch is written.
    fn place(&self, old: &[u8], new_end: usize, len: usize) -> Result<usize, FormatError> {
        let old_name = be64(old, 8) as usize..be64(old, 8) as usize + be32(old, 16) as usize;
        let first = SECTOR.max(old.len()).max(new_end).next_multiple_of(8);
        let fits = |start: usize| start + len <= self.geometry.cluster_size() as usize;
        let clear = |start: usize| start + len <= old_name.start || start >= old_name.end;
        let places = [first, first.max(old_name.end.next_multiple_of(8))];
        match places.into_iter().find(|&start| fits(start) && clear(start)) {
            Some(start) => Ok(start),
            None => refuse("no room in the first cluster for the backing file name"),
        }
    }

    /// Puts the result together. `new` replaces `old`; `tail` is written right behind it.
    fn patched(
        &self,
        old: &[u8],
        new: Vec<u8>,
        tail: &[u8],
        before: Option<(u64, Vec<u8>)>,
        backing: Option<BackingReference>,
    ) -> HeaderPatch {
        let same_rest = tail.is_empty() && new[BACKING_FIELDS.end..] == old[BACKING_FIELDS.end..];
        let end = if same_rest { BACKING_FIELDS.end } else { new.len().min(SECTOR) };
        let patch = (BACKING_FIELDS.start as u64, [&new[BACKING_FIELDS.start..end], tail].concat());
        HeaderPatch { before, patch, header: Header { backing, area: super::Area(new), ..self.clone() } }
    }
}

fn set_backing_fields(bytes: &mut [u8], offset: u64, size: u32) {
    bytes[8..16].copy_from_slice(&offset.to_be_bytes());
    bytes[16..20].copy_from_slice(&size.to_be_bytes());
}

fn refuse<T>(why: &str) -> Result<T, FormatError> {
    Err(FormatError::Invalid(why.to_string()))
}
