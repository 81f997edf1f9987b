//! `cordisk info`: facts of an image, or of a disk that runs.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use super::connection::Connection;
use super::{facts, find};
use crate::error::{Context, one_line};
use crate::info::{self, ImageInfo};
use crate::{Error, ErrorKind, Result};

/// `cordisk info`.
#[derive(Clone, Debug)]
pub struct InfoOptions {
    /// A disk that runs (its mountpoint or socket), or an image.
    pub target: PathBuf,
    /// JSON instead of lines.
    pub json: bool,
    /// The images below as well.
    pub backing_chain: bool,
}

/// Facts of an image, and where it is mounted.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    image: ImageInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    mountpoint: Option<String>,
}

/// Prints the facts.
///
/// # Errors
/// There is no such disk or image, or it cannot be read.
pub fn run(options: &InfoOptions) -> Result<ExitCode> {
    let images = match find::find(&options.target) {
        Ok(_) => {
            let (mut connection, _) = find::connect(&options.target)?;
            of_disk(&mut connection)?
        }
        // Neither a disk nor a socket. An image that is mounted has a header all the same.
        Err(_) if options.backing_chain => {
            info::chain_of(&options.target)?.into_iter().map(|image| Shown { image, mountpoint: None }).collect()
        }
        Err(_) => vec![Shown { image: info::of(&options.target)?, mountpoint: None }],
    };
    let shown = if options.backing_chain { &images[..] } else { &images[..images.len().min(1)] };
    let text = if options.json {
        let value = if options.backing_chain { serde_json::to_string_pretty(shown) } else { serde_json::to_string_pretty(&shown.first()) };
        value.map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "JSON", error))? + "\n"
    } else {
        shown.iter().map(sentences).collect::<Vec<_>>().join("\n")
    };
    std::io::stdout().write_all(text.as_bytes()).context(|| "standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn sentences(shown: &Shown) -> String {
    let mountpoint = shown.mountpoint.as_ref().map_or(String::new(), |at| format!("mounted at: {}\n", one_line(at)));
    shown.image.sentences() + &mountpoint
}

/// What the daemon says of its disk, top first.
fn of_disk(connection: &mut Connection) -> Result<Vec<Shown>> {
    let mut answer = connection.execute("query-block", json!({}))?;
    let image = answer.pointer_mut("/0/inserted/image").map(Value::take).unwrap_or_default();
    let image: ImageInfo = facts::read(image, connection.name())?;
    let mut mountpoint = facts::status(connection)?.mountpoint;
    let mut images = Vec::new();
    let mut next = Some(image);
    while let Some(mut image) = next {
        next = image.backing_image.take().map(|below| *below);
        images.push(Shown { image, mountpoint: mountpoint.take() });
    }
    Ok(images)
}
