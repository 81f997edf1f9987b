//! Changes the backing reference with one write inside sector 0, so that a crash leaves the old
//! header or the new one.

use super::extensions::PinsChange;
use super::{
    BackingReference, Extensions, FormatError, Header, HeaderPatch, MAX_BACKING_NAME, V2_LENGTH,
    be32, be64, header_length,
};

/// Bytes that a disk writes atomically: one sector.
const SECTOR: usize = 512;
/// backing_file_offset (8 bytes) and backing_file_size (4 bytes).
const BACKING_FIELDS: std::ops::Range<usize> = 8..20;

impl Header {
    /// Makes the header name another backing file, or none, and keeps every other byte of header
    /// and extensions.
    ///
    /// The backing format extension changes or disappears together with the name, and the pins of
    /// remote backing files disappear with it. Only if the extensions are too long to be rewritten
    /// in one sector does a removed name leave these extensions in place, which have no meaning
    /// without a name.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] for a name that is empty, longer than 1023 bytes or has control
    /// characters, and if the change does not fit the first cluster with one sector write.
    pub fn with_backing(
        &self,
        backing: Option<&BackingReference>,
    ) -> Result<HeaderPatch, FormatError> {
        let pins = if backing.is_some() { PinsChange::Keep } else { PinsChange::Remove };
        self.rewritten(backing, &pins)
    }

    /// Makes the header hold these pins of remote backing files, and keeps every other byte of
    /// header and extensions.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] if the header has no backing file, and if the pins do not fit the
    /// first 512 bytes, which a disk writes atomically.
    pub fn with_pins(&self, pins: &[u8]) -> Result<HeaderPatch, FormatError> {
        match &self.backing {
            Some(backing) => self
                .rewritten(Some(backing), &PinsChange::Set(pins))
                .or_else(|_| self.rewritten(Some(backing), &PinsChange::SetInsteadOfNames(pins))),
            None => refuse("there is no backing file to pin"),
        }
    }

    /// Returns the pins of remote backing files that the header holds.
    pub fn pins(&self) -> Option<Vec<u8>> {
        let bytes = &self.area.0;
        let length = header_length(bytes, self.geometry.version() >= 3).ok()?;
        let cluster_size = self.geometry.cluster_size() as usize;
        let extensions = Extensions::parse_again(bytes, length, cluster_size).ok()?;
        extensions.pins(bytes).map(<[u8]>::to_vec)
    }

    fn rewritten(
        &self,
        backing: Option<&BackingReference>,
        pins: &PinsChange<'_>,
    ) -> Result<HeaderPatch, FormatError> {
        let old = self.serialised();
        let length = header_length(&old, self.geometry.version() >= 3)?;
        let extensions =
            Extensions::parse_again(&old, length, self.geometry.cluster_size() as usize)?;
        let mut new = old[..length].to_vec();
        new.extend(extensions.with_backing_format(
            &old,
            backing.and_then(|backing| backing.format),
            pins,
        ));
        let one_sector =
            new.len() <= SECTOR || (new.len() == old.len() && new[SECTOR..] == old[SECTOR..]);
        match backing {
            None => {
                if !one_sector {
                    if !extensions.terminated() {
                        return refuse(
                            "the header extensions lack an end marker and are too long to be given one",
                        );
                    }
                    new.clone_from(&old);
                }
                set_backing_fields(&mut new, 0, 0);
                Ok(self.patched(&old, new, &[], None, None))
            }
            Some(backing) => {
                let name = backing.name.as_bytes();
                if name.is_empty()
                    || name.len() > MAX_BACKING_NAME
                    || backing.name.chars().any(char::is_control)
                {
                    return refuse(&format!(
                        "backing file name of {} bytes is empty, too long or has control characters",
                        name.len()
                    ));
                }
                if !one_sector {
                    return refuse(
                        "no room in the first 512 bytes for the header extensions with another backing format or more pins",
                    );
                }
                let in_sector = new.len() + name.len() <= SECTOR;
                let offset =
                    if in_sector { new.len() } else { self.place(&old, new.len(), name.len())? };
                set_backing_fields(&mut new, offset as u64, name.len() as u32);
                let before = (!in_sector).then(|| (offset as u64, name.to_vec()));
                Ok(self.patched(
                    &old,
                    new,
                    if in_sector { name } else { &[] },
                    before,
                    Some(backing.clone()),
                ))
            }
        }
    }

    /// Returns header and extensions as they are in the file now: the bytes read at open, updated
    /// from the public fields.
    fn serialised(&self) -> Vec<u8> {
        let mut bytes = self.area.0.clone();
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        // A size that is no multiple of 512 stays unchanged unless the disk was resized.
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

    /// Returns an offset in the first cluster for a name of `len` bytes. It lies outside sector 0
    /// and apart from the extensions and the old name, which stay valid until the patch is written.
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

    /// Makes the patch. `new` replaces `old`; `tail` is written directly after it.
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
        HeaderPatch {
            before,
            patch,
            header: Header { backing, area: super::Area(new), ..self.clone() },
        }
    }
}

fn set_backing_fields(bytes: &mut [u8], offset: u64, size: u32) {
    bytes[8..16].copy_from_slice(&offset.to_be_bytes());
    bytes[16..20].copy_from_slice(&size.to_be_bytes());
}

fn refuse<T>(why: &str) -> Result<T, FormatError> {
    Err(FormatError::Invalid(why.to_string()))
}
