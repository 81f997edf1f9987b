//! Negotiation with a server, up to the first request.
//!
//! ```text
//! greeting ─▶ [STARTTLS, TLS] ─▶ STRUCTURED_REPLY ─▶ SET_META_CONTEXT ─▶ GO ─▶ requests
//!      │                                                       unknown ─▶ EXPORT_NAME ─▶ requests
//!      └ not "fixed" ─────────────────────────────────────────────────▶ EXPORT_NAME
//! ```
//!
//! Reads exactly the bytes of the negotiation, so that no byte which came before TLS counts after
//! it.

use std::io::{self, Read, Write};

use crate::error::{NbdError, NbdErrorKind, Result, foreign, io_text};
use crate::protocol::{self, BlockSizes, NbdInfo, NbdOption, OptionReplyHeader, OptionReplyKind};
use crate::replies::ReplyRules;

/// What was agreed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Agreement {
    /// Size of the export in bytes.
    pub size: u64,
    /// Several connections see the same data.
    pub multi_conn: bool,
    pub sizes: BlockSizes,
    pub rules: ReplyRules,
}

/// The greeting of a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Greeting {
    /// The server replies to options.
    fixed: bool,
    no_zeroes: bool,
}

/// A reply to an option with its payload.
struct OptionReply {
    kind: OptionReplyKind,
    payload: Vec<u8>,
}

/// Reads the greeting of the server and answers it.
pub(crate) fn greet(stream: &mut (impl Read + Write)) -> Result<Greeting> {
    let magic = read_u64(stream)?;
    if magic != protocol::NBDMAGIC {
        return Err(NbdError::new(
            NbdErrorKind::Protocol,
            "what listens there is not an NBD server: check the address",
        ));
    }
    match read_u64(stream)? {
        protocol::IHAVEOPT => {}
        protocol::OLDSTYLE => {
            return Err(NbdError::new(
                NbdErrorKind::Protocol,
                "the server speaks oldstyle negotiation only: start it with newstyle",
            ));
        }
        other => return Err(NbdError::protocol(format!("magic {other:#x} of a greeting"))),
    }
    let mut flags = [0; 2];
    read(stream, &mut flags)?;
    let flags = u16::from_be_bytes(flags);
    let answer = flags & (protocol::FIXED_NEWSTYLE | protocol::NO_ZEROES);
    write(stream, &u32::from(answer).to_be_bytes())?;
    Ok(Greeting {
        fixed: flags & protocol::FIXED_NEWSTYLE != 0,
        no_zeroes: flags & protocol::NO_ZEROES != 0,
    })
}

/// Asks the server to start TLS. After that, the client must start it.
pub(crate) fn start_tls(stream: &mut (impl Read + Write), greeting: Greeting) -> Result<()> {
    let refused = |why: String| {
        NbdError::new(NbdErrorKind::Tls, format!("the server does not offer TLS: {why}"))
    };
    if !greeting.fixed {
        return Err(refused("it is too old".into()));
    }
    write(stream, &protocol::option(NbdOption::StartTls, &[]))?;
    let reply = option_reply(stream, NbdOption::StartTls)?;
    match reply.kind {
        OptionReplyKind::Ack if reply.payload.is_empty() => Ok(()),
        OptionReplyKind::Ack => Err(NbdError::protocol("a reply to StartTls with a payload")),
        OptionReplyKind::Info | OptionReplyKind::MetaContext | OptionReplyKind::Unexpected(_) => {
            Err(unexpected(&reply, NbdOption::StartTls))
        }
        _ => Err(refused(format!("{:?} {}", reply.kind, foreign(&reply.payload)))),
    }
}

/// Chooses `export` and the best way to talk about it.
pub(crate) fn negotiate(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    export: &str,
) -> Result<Agreement> {
    if !greeting.fixed {
        let rules = ReplyRules { structured: false, allocation: None };
        return export_name(stream, greeting, export, rules);
    }
    let structured = structured_reply(stream)?;
    let allocation = if structured { meta_context(stream, export)? } else { None };
    let rules = ReplyRules { structured, allocation };
    match go(stream, export, rules)? {
        Some(agreement) => Ok(agreement),
        None => export_name(stream, greeting, export, rules),
    }
}

/// Returns whether the server sends structured replies.
fn structured_reply(stream: &mut (impl Read + Write)) -> Result<bool> {
    write(stream, &protocol::option(NbdOption::StructuredReply, &[]))?;
    let reply = option_reply(stream, NbdOption::StructuredReply)?;
    match reply.kind {
        OptionReplyKind::Ack => Ok(true),
        _ => declined(&reply, NbdOption::StructuredReply).map(|()| false),
    }
}

/// Returns the id of `base:allocation` if the server has it.
fn meta_context(stream: &mut (impl Read + Write), export: &str) -> Result<Option<u32>> {
    const OPTION: NbdOption = NbdOption::SetMetaContext;
    write(stream, &protocol::option(OPTION, &protocol::meta_context_payload(export)))?;
    let mut id = None;
    for _ in 0..protocol::MOST_OPTION_REPLIES {
        let reply = option_reply(stream, OPTION)?;
        match reply.kind {
            OptionReplyKind::Ack => return Ok(id),
            OptionReplyKind::MetaContext => {
                let (found, name) = protocol::meta_context(&reply.payload)?;
                if name != protocol::BASE_ALLOCATION.as_bytes() || id.replace(found).is_some() {
                    return Err(NbdError::protocol(format!(
                        "metadata context \"{}\", which was not asked for",
                        foreign(name)
                    )));
                }
            }
            // An export that does not exist is reported by the option that opens it.
            OptionReplyKind::UnknownExport => return Ok(None),
            _ => return declined(&reply, OPTION).map(|()| None),
        }
    }
    Err(too_many(OPTION))
}

/// Opens `export`. Returns `None` if the server does not know how.
fn go(
    stream: &mut (impl Read + Write),
    export: &str,
    rules: ReplyRules,
) -> Result<Option<Agreement>> {
    const OPTION: NbdOption = NbdOption::Go;
    write(stream, &protocol::option(OPTION, &protocol::go_payload(export)))?;
    let mut found = None;
    let mut sizes = BlockSizes::default();
    for _ in 0..protocol::MOST_OPTION_REPLIES {
        let reply = option_reply(stream, OPTION)?;
        match reply.kind {
            OptionReplyKind::Info => match protocol::info(&reply.payload)? {
                NbdInfo::Export { size, flags } => found = Some((size, flags)),
                NbdInfo::BlockSizes(told) => sizes = told,
                NbdInfo::Other => {}
            },
            OptionReplyKind::Ack => {
                let (size, flags) = found.ok_or_else(|| {
                    NbdError::protocol("no information about the export before the last reply")
                })?;
                return agreement(size, flags, sizes, rules).map(Some);
            }
            OptionReplyKind::Unsupported => return Ok(None),
            OptionReplyKind::UnknownExport | OptionReplyKind::Policy => {
                return Err(no_export(&format!("{:?} {}", reply.kind, foreign(&reply.payload))));
            }
            _ => {
                declined(&reply, OPTION)?;
                let text = format!(
                    "the server does not serve the export: {:?} {}",
                    reply.kind,
                    foreign(&reply.payload)
                );
                return Err(NbdError::new(NbdErrorKind::Connect, text));
            }
        }
    }
    Err(too_many(OPTION))
}

/// Opens `export` on a server that does not know NBD_OPT_GO. Such a server closes the connection if
/// it has no such export.
fn export_name(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    export: &str,
    rules: ReplyRules,
) -> Result<Agreement> {
    write(stream, &protocol::option(NbdOption::ExportName, export.as_bytes()))?;
    let mut reply = [0; 10];
    match stream.read_exact(&mut reply) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(no_export("the server has closed the connection"));
        }
        other => other.map_err(|error| failed(&error))?,
    }
    let mut bytes = &reply[..];
    let size = protocol::take_u64(&mut bytes).unwrap_or_default();
    let flags = protocol::take_u16(&mut bytes).unwrap_or_default();
    if !greeting.no_zeroes {
        read(stream, &mut [0; 124])?;
    }
    agreement(size, flags, BlockSizes::default(), rules)
}

fn agreement(size: u64, flags: u16, sizes: BlockSizes, rules: ReplyRules) -> Result<Agreement> {
    if i64::try_from(size).is_err() {
        return Err(NbdError::protocol(format!("an export of {size} bytes")));
    }
    let multi_conn = flags & protocol::HAS_FLAGS != 0 && flags & protocol::CAN_MULTI_CONN != 0;
    Ok(Agreement { size, multi_conn, sizes, rules })
}

/// Reads one reply to `option`.
fn option_reply(stream: &mut impl Read, option: NbdOption) -> Result<OptionReply> {
    let mut header = [0; protocol::OPTION_REPLY_HEADER];
    read(stream, &mut header)?;
    let OptionReplyHeader { kind, len } = protocol::option_reply(&header, option)?;
    let mut payload = vec![0; len as usize]; // at most a few KiB
    read(stream, &mut payload)?;
    Ok(OptionReply { kind, payload })
}

/// Accepts an error reply to an option that the client can do without.
fn declined(reply: &OptionReply, option: NbdOption) -> Result<()> {
    match reply.kind {
        OptionReplyKind::TlsRequired => {
            Err(NbdError::new(NbdErrorKind::Tls, "the server demands TLS: use nbds instead of nbd"))
        }
        OptionReplyKind::Shutdown => {
            Err(NbdError::new(NbdErrorKind::Connect, "the server is shutting down"))
        }
        OptionReplyKind::Unsupported
        | OptionReplyKind::Policy
        | OptionReplyKind::UnknownExport
        | OptionReplyKind::OtherError(_) => Ok(()),
        OptionReplyKind::Ack
        | OptionReplyKind::Info
        | OptionReplyKind::MetaContext
        | OptionReplyKind::Unexpected(_) => Err(unexpected(reply, option)),
    }
}

fn unexpected(reply: &OptionReply, option: NbdOption) -> NbdError {
    NbdError::protocol(format!("reply {:?} to option {option:?}", reply.kind))
}

fn too_many(option: NbdOption) -> NbdError {
    NbdError::protocol(format!(
        "more than {} replies to option {option:?}",
        protocol::MOST_OPTION_REPLIES
    ))
}

fn no_export(why: &str) -> NbdError {
    let text = format!("the server has no export of this name for this client: {why}");
    NbdError::new(NbdErrorKind::NoExport, text)
}

fn read(stream: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
    stream.read_exact(bytes).map_err(|error| failed(&error))
}

fn read_u64(stream: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    read(stream, &mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn write(stream: &mut impl Write, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).and_then(|()| stream.flush()).map_err(|error| failed(&error))
}

/// Returns the error of a negotiation that the connection has ended.
pub(crate) fn failed(error: &io::Error) -> NbdError {
    if let Some(cause) = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>()) {
        return crate::tls::failed(cause.to_string()); // such as a demand for a certificate
    }
    let why = match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server has closed the connection".into(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            "the server does not answer in time".into()
        }
        _ => io_text(error),
    };
    NbdError::new(NbdErrorKind::Connect, format!("negotiation failed: {why}"))
}
