//! `cordisk info`: facts of an image, or of a running disk.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::{facts, find};
use crate::info;
use control::connection::Connection;
use control::facts::ImageInfo;
use host::error::one_line;
use host::{Error, ErrorKind, Result};

/// The options of `cordisk info`.
#[derive(Clone, Debug)]
pub struct InfoOptions {
    /// A running disk (its mountpoint or socket), or an image.
    pub target: PathBuf,
    /// Print JSON instead of lines.
    pub json: bool,
    /// Also print the images of the backing chain.
    pub backing_chain: bool,
}

/// Facts of an image, and where it is mounted.
#[derive(Debug, Serialize)]
struct ShownImage {
    #[serde(flatten)]
    image: ImageInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    mountpoint: Option<String>,
}

/// Prints the facts of the target.
///
/// # Errors
/// There is no such disk or image, or it cannot be read.
pub fn run(options: &InfoOptions) -> Result<ExitCode> {
    let images = match find::find(&options.target) {
        Ok(_) => {
            let (mut connection, _) = find::connect(&options.target)?;
            of_disk(&mut connection)?
        }
        // The target is neither a disk nor a socket. The header of a mounted image can be read all
        // the same.
        Err(_) if options.backing_chain => info::chain_of(&options.target)?
            .into_iter()
            .map(|image| ShownImage { image, mountpoint: None })
            .collect(),
        Err(_) => vec![ShownImage { image: info::of(&options.target)?, mountpoint: None }],
    };
    let shown = if options.backing_chain { &images[..] } else { &images[..images.len().min(1)] };
    let text = if options.json {
        let value = if options.backing_chain {
            serde_json::to_string_pretty(shown)
        } else {
            serde_json::to_string_pretty(&shown.first())
        };
        value.map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "JSON", error))? + "\n"
    } else {
        shown.iter().map(sentences).collect::<Vec<_>>().join("\n")
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::standard_output)?;
    Ok(ExitCode::SUCCESS)
}

fn sentences(shown: &ShownImage) -> String {
    let mountpoint = shown
        .mountpoint
        .as_ref()
        .map_or(String::new(), |at| format!("mounted at: {}\n", one_line(at)));
    info::sentences(&shown.image) + &mountpoint
}

/// Returns the daemon's facts about the images of its disk, the overlay first.
fn of_disk(connection: &mut Connection) -> Result<Vec<ShownImage>> {
    let image = facts::block(connection)?.image;
    let mut mountpoint = facts::status(connection)?.mountpoint;
    let mut images = Vec::new();
    let mut next = Some(image);
    while let Some(mut image) = next {
        next = image.backing_image.take().map(|below| *below);
        images.push(ShownImage { image, mountpoint: mountpoint.take() });
    }
    Ok(images)
}
