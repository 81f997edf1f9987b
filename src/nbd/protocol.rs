//! Messages of the NBD protocol as bytes. Pure: no function here reads from a connection.
//!
//! All numbers are big-endian. Functions that parse return `Err` with the rule that the server has
//! violated.

use crate::error::{NbdError, Result};

/// First bytes of a server.
pub(crate) const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second part of the greeting of newstyle negotiation, and first bytes of each option.
pub(crate) const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second part of the greeting of oldstyle negotiation.
pub(crate) const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake flags of the server and of the client.
pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const NO_ZEROES: u16 = 1 << 1;
/// Transmission flags.
pub(crate) const HAS_FLAGS: u16 = 1 << 0;
pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;

/// Longest string of the protocol, in bytes (NBD protocol, "String values").
pub(crate) const LONGEST_STRING: usize = 4096;
/// Largest payload, in bytes, that clients and servers must support without an agreement (NBD
/// protocol, "Block size constraints").
pub(crate) const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest reply to an option: a string with a few numbers.
pub(crate) const LONGEST_OPTION_REPLY: u32 = LONGEST_STRING as u32 + 64;
/// Most replies to one option. A server of one export with one context sends fewer than ten.
pub(crate) const MOST_OPTION_REPLIES: usize = 64;
/// Most descriptors in a reply to NBD_CMD_BLOCK_STATUS: what nbdkit sends at most.
pub(crate) const MOST_DESCRIPTORS: u32 = 1 << 20;
/// Largest minimum block size, in bytes (NBD protocol, "Block size constraints").
const LARGEST_MINIMUM: u32 = 64 << 10;

/// The name of the metadata context that tells holes.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
/// State flag of `base:allocation`: the range reads as zeros. (The other flag, NBD_STATE_HOLE,
/// says nothing about the content.)
const STATE_ZERO: u32 = 1 << 1;

/// Options that this client sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum NbdOption {
    ExportName = 1,
    StartTls = 5,
    Go = 7,
    StructuredReply = 8,
    SetMetaContext = 10,
}

/// Commands that this client sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub(crate) enum NbdCommand {
    Read = 0,
    Disconnect = 2,
    BlockStatus = 7,
}

/// Type of a reply to an option.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum OptionReplyKind {
    Ack,
    Info,
    MetaContext,
    Unsupported,
    Policy,
    TlsRequired,
    UnknownExport,
    Shutdown,
    OtherError(u32),
    Unexpected(u32),
}

/// The header of a reply to an option, and the length of its payload in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct OptionReplyHeader {
    pub kind: OptionReplyKind,
    pub len: u32,
}

/// Length of [`OptionReplyHeader`] on the wire, in bytes.
pub(crate) const OPTION_REPLY_HEADER: usize = 20;

/// Block sizes of an export, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct BlockSizes {
    /// Offsets and lengths of requests must be multiples of it. A power of two.
    pub minimum: u32,
    /// Offsets and lengths of requests had better be multiples of it. A power of two.
    pub preferred: u32,
    /// Most bytes of a read.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// Returns what the NBD protocol recommends to clients without an agreement.
    fn default() -> Self {
        BlockSizes { minimum: 512, preferred: 4096, maximum: MAX_PAYLOAD }
    }
}

/// One item of information about an export.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NbdInfo {
    Export { size: u64, flags: u16 },
    BlockSizes(BlockSizes),
    Other,
}

/// The header of a reply to a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ReplyHeader {
    Simple { error: u32, cookie: u64 },
    Chunk { last: bool, kind: u16, cookie: u64, len: u32 },
}

/// Length of a simple reply header on the wire, which is also the part of a chunk's header that has
/// the cookie.
pub(crate) const SIMPLE_REPLY_HEADER: usize = 16;
/// Length of the rest of a chunk's header.
pub(crate) const CHUNK_HEADER_REST: usize = 4;

/// What the payload of a chunk is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ChunkKind {
    None,
    Data,
    Hole,
    BlockStatus,
    Error,
    ErrorOffset,
    OtherError,
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*first)
}

/// Takes a number from the front of `bytes`.
pub(crate) fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    take(bytes).map(u16::from_be_bytes)
}

/// Takes a number from the front of `bytes`.
pub(crate) fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes).map(u32::from_be_bytes)
}

/// Takes a number from the front of `bytes`.
pub(crate) fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    take(bytes).map(u64::from_be_bytes)
}

/// Returns an option with its payload.
pub(crate) fn option(option: NbdOption, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX); // names are bounded by the caller
    let mut bytes = Vec::with_capacity(16 + payload.len());
    bytes.extend(IHAVEOPT.to_be_bytes());
    bytes.extend((option as u32).to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(text.as_bytes());
}

/// Returns the payload of NBD_OPT_GO that asks for the block sizes of `export`.
pub(crate) fn go_payload(export: &str) -> Vec<u8> {
    const INFO_BLOCK_SIZE: u16 = 3;
    let mut bytes = Vec::new();
    string(&mut bytes, export);
    bytes.extend(1u16.to_be_bytes());
    bytes.extend(INFO_BLOCK_SIZE.to_be_bytes());
    bytes
}

/// Returns the payload of NBD_OPT_SET_META_CONTEXT that selects `base:allocation` of `export`.
pub(crate) fn meta_context_payload(export: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    string(&mut bytes, export);
    bytes.extend(1u32.to_be_bytes());
    string(&mut bytes, BASE_ALLOCATION);
    bytes
}

/// Parses the header of a reply to `asked`.
pub(crate) fn option_reply(
    header: &[u8; OPTION_REPLY_HEADER],
    asked: NbdOption,
) -> Result<OptionReplyHeader> {
    let mut bytes = &header[..];
    let (Some(magic), Some(option), Some(kind), Some(len)) =
        (take_u64(&mut bytes), take_u32(&mut bytes), take_u32(&mut bytes), take_u32(&mut bytes))
    else {
        return Err(NbdError::protocol("a reply to an option is cut"));
    };
    if magic != OPTION_REPLY {
        return Err(NbdError::protocol(format!("magic {magic:#x} of a reply to an option")));
    }
    if option != asked as u32 {
        return Err(NbdError::protocol(format!("a reply to option {option} instead of {asked:?}")));
    }
    if len > LONGEST_OPTION_REPLY {
        return Err(NbdError::protocol(format!("a reply of {len} bytes to option {asked:?}")));
    }
    const ERROR: u32 = 1 << 31;
    let kind = match kind {
        1 => OptionReplyKind::Ack,
        3 => OptionReplyKind::Info,
        4 => OptionReplyKind::MetaContext,
        error if error & ERROR != 0 => match error & !ERROR {
            1 => OptionReplyKind::Unsupported,
            2 => OptionReplyKind::Policy,
            5 => OptionReplyKind::TlsRequired,
            6 => OptionReplyKind::UnknownExport,
            7 => OptionReplyKind::Shutdown,
            other => OptionReplyKind::OtherError(other),
        },
        other => OptionReplyKind::Unexpected(other),
    };
    Ok(OptionReplyHeader { kind, len })
}

/// Parses the payload of NBD_REP_INFO.
pub(crate) fn info(mut payload: &[u8]) -> Result<NbdInfo> {
    const EXPORT: u16 = 0;
    const BLOCK_SIZE: u16 = 3;
    let wrong_len = || NbdError::protocol("the length of an information about the export");
    let bytes = &mut payload;
    let kind = take_u16(bytes).ok_or_else(wrong_len)?;
    let info = match kind {
        EXPORT => NbdInfo::Export {
            size: take_u64(bytes).ok_or_else(wrong_len)?,
            flags: take_u16(bytes).ok_or_else(wrong_len)?,
        },
        BLOCK_SIZE => {
            let minimum = take_u32(bytes).ok_or_else(wrong_len)?;
            let preferred = take_u32(bytes).ok_or_else(wrong_len)?;
            let maximum = take_u32(bytes).ok_or_else(wrong_len)?;
            NbdInfo::BlockSizes(block_sizes(minimum, preferred, maximum)?)
        }
        _ => return Ok(NbdInfo::Other),
    };
    if payload.is_empty() { Ok(info) } else { Err(wrong_len()) }
}

fn block_sizes(minimum: u32, preferred: u32, maximum: u32) -> Result<BlockSizes> {
    let valid = minimum.is_power_of_two()
        && minimum <= LARGEST_MINIMUM
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum >= minimum;
    if !valid {
        return Err(NbdError::protocol(format!(
            "block sizes {minimum} (minimum), {preferred} (preferred), {maximum} (maximum)"
        )));
    }
    let maximum = maximum.min(MAX_PAYLOAD);
    Ok(BlockSizes { minimum, preferred, maximum: maximum - maximum % minimum })
}

/// Parses the payload of NBD_REP_META_CONTEXT: the id and the name of a context.
pub(crate) fn meta_context(mut payload: &[u8]) -> Result<(u32, &[u8])> {
    let id = take_u32(&mut payload)
        .ok_or_else(|| NbdError::protocol("the length of a metadata context"))?;
    Ok((id, payload))
}

/// Returns a request.
pub(crate) fn request(command: NbdCommand, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    let fields: [&[u8]; 6] = [
        &REQUEST.to_be_bytes(),
        &0u16.to_be_bytes(),
        &(command as u16).to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ];
    for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    bytes
}

/// Parses the first 16 bytes of a reply. The length of a chunk, which follows them, is still zero.
pub(crate) fn reply_start(start: &[u8; SIMPLE_REPLY_HEADER]) -> Result<ReplyHeader> {
    let mut bytes = &start[..];
    let cut = || NbdError::protocol("a reply is cut");
    let magic = take_u32(&mut bytes).ok_or_else(cut)?;
    match magic {
        SIMPLE_REPLY => Ok(ReplyHeader::Simple {
            error: take_u32(&mut bytes).ok_or_else(cut)?,
            cookie: take_u64(&mut bytes).ok_or_else(cut)?,
        }),
        STRUCTURED_REPLY => {
            const DONE: u16 = 1 << 0;
            let flags = take_u16(&mut bytes).ok_or_else(cut)?;
            if flags & !DONE != 0 {
                return Err(NbdError::protocol(format!("flags {flags:#x} of a reply")));
            }
            Ok(ReplyHeader::Chunk {
                last: flags & DONE != 0,
                kind: take_u16(&mut bytes).ok_or_else(cut)?,
                cookie: take_u64(&mut bytes).ok_or_else(cut)?,
                len: 0,
            })
        }
        _ => Err(NbdError::protocol(format!("magic {magic:#x} of a reply"))),
    }
}

/// Checks the type of a chunk and the length of its payload, so that no server makes this client
/// read or allocate without bounds.
pub(crate) fn chunk_kind(kind: u16, last: bool, len: u32) -> Result<ChunkKind> {
    const ERROR: u16 = 1 << 15;
    const LONGEST_ERROR: u32 = 4 + 2 + 8 + LONGEST_STRING as u32;
    let (kind, valid) = match kind {
        0 => (ChunkKind::None, len == 0 && last),
        1 => (ChunkKind::Data, len > 8 && len - 8 <= MAX_PAYLOAD),
        2 => (ChunkKind::Hole, len == 12),
        5 => {
            (ChunkKind::BlockStatus, len >= 12 && len % 8 == 4 && (len - 4) / 8 <= MOST_DESCRIPTORS)
        }
        0x8001 => (ChunkKind::Error, (6..=LONGEST_ERROR).contains(&len)),
        0x8002 => (ChunkKind::ErrorOffset, (14..=LONGEST_ERROR).contains(&len)),
        other if other & ERROR != 0 => (ChunkKind::OtherError, (6..=LONGEST_ERROR).contains(&len)),
        other => return Err(NbdError::protocol(format!("a chunk of type {other}"))),
    };
    if valid {
        Ok(kind)
    } else {
        Err(NbdError::protocol(format!("a chunk of type {kind:?} with {len} bytes")))
    }
}

/// An error chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ErrorChunk<'a> {
    pub number: u32,
    pub message: &'a [u8],
    /// Offset of the failure in the export; only in [`ChunkKind::ErrorOffset`].
    pub offset: Option<u64>,
}

/// Parses the payload of an error chunk.
pub(crate) fn error_chunk(kind: ChunkKind, mut payload: &[u8]) -> Result<ErrorChunk<'_>> {
    let wrong = || NbdError::protocol("the length of an error chunk");
    let number = take_u32(&mut payload).ok_or_else(wrong)?;
    let len = usize::from(take_u16(&mut payload).ok_or_else(wrong)?);
    if number == 0 {
        return Err(NbdError::protocol("an error chunk without an error"));
    }
    if len > LONGEST_STRING {
        return Err(wrong());
    }
    let (message, mut rest) = payload.split_at_checked(len).ok_or_else(wrong)?;
    let offset = match kind {
        ChunkKind::ErrorOffset => Some(take_u64(&mut rest).ok_or_else(wrong)?),
        ChunkKind::OtherError => None,
        _ if rest.is_empty() => None,
        _ => return Err(wrong()),
    };
    Ok(ErrorChunk { number, message, offset })
}

/// One run of `base:allocation`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Descriptor {
    /// Length in bytes, not zero.
    pub len: u32,
    /// The range reads as zeros.
    pub zero: bool,
}

/// Parses the payload of a block status chunk: the id of its context, and its descriptors.
pub(crate) fn block_status(mut payload: &[u8]) -> Result<(u32, Vec<Descriptor>)> {
    let id =
        take_u32(&mut payload).ok_or_else(|| NbdError::protocol("the length of a block status"))?;
    let mut descriptors = Vec::with_capacity(payload.len() / 8);
    while let (Some(len), Some(flags)) = (take_u32(&mut payload), take_u32(&mut payload)) {
        if len == 0 {
            return Err(NbdError::protocol("a block status of zero bytes"));
        }
        descriptors.push(Descriptor { len, zero: flags & STATE_ZERO != 0 });
    }
    if descriptors.is_empty() || !payload.is_empty() {
        return Err(NbdError::protocol("the length of a block status"));
    }
    Ok((id, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_of_a_server_are_checked_and_capped() {
        let info = |minimum: u32, preferred: u32, maximum: u32| {
            let mut bytes = vec![0, 3];
            for number in [minimum, preferred, maximum] {
                bytes.extend(number.to_be_bytes());
            }
            info(&bytes)
        };
        let sizes = |minimum, preferred, maximum| {
            NbdInfo::BlockSizes(BlockSizes { minimum, preferred, maximum })
        };
        assert_eq!(info(1, 4096, u32::MAX).unwrap(), sizes(1, 4096, MAX_PAYLOAD));
        assert_eq!(info(4096, 65536, 100_000).unwrap(), sizes(4096, 65536, 98304));
        for (minimum, preferred, maximum) in [
            (0, 4096, 4096),
            (3, 4096, 4096),
            (131_072, 131_072, u32::MAX),
            (4096, 512, 4096),
            (4096, 4096, 512),
            (1, 0, 512),
        ] {
            assert!(info(minimum, preferred, maximum).is_err(), "{minimum} {preferred} {maximum}");
        }
    }

    #[test]
    fn a_request_has_the_layout_of_the_protocol() {
        assert_eq!(
            request(NbdCommand::BlockStatus, 0x0102_0304_0506_0708, 0x1122_3344_5566_7788, 0x99aa),
            *b"\x25\x60\x95\x13\0\0\0\x07\x01\x02\x03\x04\x05\x06\x07\x08\x11\x22\x33\x44\x55\x66\x77\x88\0\0\x99\xaa"
        );
    }

    #[test]
    fn lengths_of_chunks_are_bounded() {
        for (kind, last, len, valid) in [
            (0, true, 0, true),
            (0, false, 0, false),
            (0, true, 1, false),
            (1, true, 8, false),
            (1, true, 9, true),
            (1, true, MAX_PAYLOAD + 8, true),
            (1, true, MAX_PAYLOAD + 9, false),
            (2, true, 12, true),
            (2, true, 13, false),
            (3, true, 12, false),
            (5, true, 4, false),
            (5, true, 12, true),
            (5, true, 16, false),
            (5, true, 4 + 8 * MOST_DESCRIPTORS, true),
            (5, true, 12 + 8 * MOST_DESCRIPTORS, false),
            (0x8001, true, 5, false),
            (0x8001, true, 6, true),
            (0x8001, true, 1 << 20, false),
            (0x8002, true, 13, false),
            (0x80ff, true, 6, true),
        ] {
            assert_eq!(chunk_kind(kind, last, len).is_ok(), valid, "{kind:#x} {last} {len}");
        }
    }

    #[test]
    fn only_the_zero_flag_means_zeros() {
        let mut payload = 7u32.to_be_bytes().to_vec();
        for (len, flags) in [(4096u32, 0u32), (512, 1), (1024, 2), (2048, 3), (1, 0xffff_fffd)] {
            payload.extend(len.to_be_bytes());
            payload.extend(flags.to_be_bytes());
        }
        let (id, found) = block_status(&payload).unwrap();
        assert_eq!(id, 7);
        let zero: Vec<_> = found.iter().map(|run| (run.len, run.zero)).collect();
        assert_eq!(zero, [(4096, false), (512, false), (1024, true), (2048, true), (1, false)]);
    }

    #[test]
    fn error_chunks_are_checked() {
        let parse = |kind, bytes: &'static [u8]| error_chunk(kind, bytes);
        let plain = parse(ChunkKind::Error, b"\0\0\0\x05\0\x02ab").unwrap();
        assert_eq!((plain.number, plain.message, plain.offset), (5, &b"ab"[..], None));
        let at = parse(ChunkKind::ErrorOffset, b"\0\0\0\x05\0\0\0\0\0\0\0\0\0\x09").unwrap();
        assert_eq!(at.offset, Some(9));
        assert!(parse(ChunkKind::Error, b"\0\0\0\x05\0\x03ab").is_err(), "message is cut");
        assert!(parse(ChunkKind::Error, b"\0\0\0\x05\0\x01ab").is_err(), "bytes are left over");
        assert!(parse(ChunkKind::Error, b"\0\0\0\0\0\0").is_err(), "no error");
        assert!(parse(ChunkKind::OtherError, b"\0\0\0\x05\0\x01abc").is_ok(), "unknown rest");
    }
}
