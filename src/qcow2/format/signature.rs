//! Recognises image formats by their first bytes, for messages only. No decision depends on it.

/// Returns the name of the image format (other than raw) of a file with these first bytes, and its
/// name in `qemu-img -f`. The signatures are those of QEMU's probe functions in `block/*.c`.
pub fn signature(first: &[u8]) -> Option<(&'static str, &'static str)> {
    /// Offset of the signature, its bytes, and the two names.
    type Known = (usize, &'static [u8], &'static str, &'static str);
    const KNOWN: [Known; 9] = [
        (0, b"QFI\xfb\0\0\0\x01", "QCOW (version 1)", "qcow"),
        (0, b"QFI\xfb", "qcow2", "qcow2"),
        (0, b"QED\0", "QED", "qed"),
        (0, b"KDMV", "VMDK", "vmdk"),
        (0, b"COWD", "VMDK", "vmdk"),
        (0, b"# Disk DescriptorFile", "VMDK", "vmdk"),
        (0x40, b"\x7f\x10\xda\xbe", "VDI", "vdi"),
        (0, b"vhdxfile", "VHDX", "vhdx"),
        (0, b"conectix", "VHD", "vpc"),
    ];
    let known = KNOWN
        .iter()
        .find(|(at, bytes, ..)| first.get(*at..).is_some_and(|rest| rest.starts_with(bytes)));
    known.map(|&(_, _, name, format)| (name, format))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
        vdi.resize(0x40, 0);
        assert_eq!(signature(&vdi), None, "the number decides");
        vdi.extend([0x7f, 0x10, 0xda, 0xbe]);
        for (first, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Some("qcow2")),
            (b"QFI\xfb\0\0\0\x01", Some("qcow")),
            (b"QFI\xfb", Some("qcow2")),
            (b"KDMV\x01\0\0\0", Some("vmdk")),
            (b"# Disk DescriptorFile\nversion=1\n", Some("vmdk")),
            (&vdi, Some("vdi")),
            (b"vhdxfileQ\0E\0M\0U\0", Some("vhdx")),
            (b"conectix\0\0\0\x02", Some("vpc")),
            (b"QED\0\0\0\x01\0", Some("qed")),
            (b"QFI", None),
            (b"", None),
            (b"\xeb\x63\x90", None),
        ] {
            assert_eq!(signature(first).map(|(_, format)| format), format, "{first:?}");
        }
    }
}
