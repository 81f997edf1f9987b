//! Chains of images with hostile backing names. The engine must open exactly what the rules of
//! `engine::chain::gate` allow, and read what an independent reader reads.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::template::{Kind, Shape, build};
use super::{Input, pattern};
use engine::chain::{Chain, Content, Gate, MAX_LAYERS, Namer};
use qcow2::format::{BackingFormat, BackingReference};
use sim::spec::Layout;

/// A backing reference as a header contains it: name and format.
type Reference = (Vec<u8>, Option<Vec<u8>>);

/// The bytes of an image and the backing reference in its header.
struct Image {
    bytes: Vec<u8>,
    backing: Option<Reference>,
}

/// A temporary directory that is removed when it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        let numbered = |number| {
            std::env::temp_dir().join(format!("cordisk-chain-{}-{number}", std::process::id()))
        };
        let path = (0..1000)
            .map(numbered)
            .find(|path| fs::create_dir(path).is_ok())
            .expect("a directory for the images");
        fs::create_dir(path.join("sub")).expect("a directory in it");
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The fuzz target: 2 to 20 images that name each other and other files.
///
/// # Panics
/// If a check fails.
pub fn any_bytes(data: &[u8]) {
    let mut input = Input(data);
    let directory = Directory::new();
    let count = 2 + if input.one_in(4) { input.below(19) } else { input.below(3) };
    let straight = input.one_in(3);
    let images: Vec<Image> =
        (0..count).map(|index| image(&directory.0, index, count, straight, &mut input)).collect();
    for (index, image) in images.iter().enumerate() {
        fs::write(directory.0.join(format!("{index}.qcow2")), &image.bytes)
            .expect("an image is written");
    }
    let raw = pattern(1, 1000 + 512 * input.below(8) as usize);
    fs::write(directory.0.join("base.raw"), &raw).expect("a base is written");
    for (name, target) in
        [("link", "1.qcow2"), ("loop", "loop"), ("sub/link", "../base.raw"), ("out", "/dev/null")]
    {
        symlink(target, directory.0.join(name)).expect("a link is made");
    }
    let fifo = directory.0.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .expect("a fifo is made");

    let gate_format = input.pick(&[None, Some(BackingFormat::Raw), Some(BackingFormat::Qcow2)]);
    let overlay = directory.0.join("0.qcow2");
    let identity =
        fs::metadata(&overlay).map(|found| (found.dev(), found.ino())).expect("it was written");
    let mut gate = Gate { backing_format: gate_format, ..Gate::default() };
    gate.taken.push(identity);
    let Some((name, format)) = images[0].backing.clone() else { return };
    let (Ok(name), Ok(format)) = (String::from_utf8(name), known(format.as_deref())) else {
        return;
    };
    // A format that the user gives must not contradict the image's own.
    let contradicted = format.is_some() && gate_format.is_some() && format != gate_format;
    let expected = if contradicted {
        None
    } else {
        expected(&images, identity, (&name, format.or(gate_format)), &directory.0)
    };
    let reference = BackingReference { name, format };
    match (Chain::open(&reference, Namer::User { directory: &directory.0 }, &gate), expected) {
        (Ok(chain), Some(expected)) => read(&chain, &expected),
        (Err(error), None) => {
            let text = error.to_string();
            assert!(!text.contains('\n') && !text.contains('\u{1b}'), "one line: {text:?}");
        }
        (Ok(chain), None) => panic!("should have been refused: {:?}", chain.layers()),
        (Err(error), Some(_)) => panic!("should have been opened: {error}"),
    }
}

/// Makes an image of a few clusters. With `straight`, it names the image of the next index.
fn image(directory: &Path, index: u64, count: u64, straight: bool, input: &mut Input<'_>) -> Image {
    let here = directory.display();
    let backing = if straight {
        let next = index + 1;
        if next < count {
            Some((format!("{next}.qcow2").into_bytes(), Some(b"qcow2".to_vec())))
        } else {
            Some((b"base.raw".to_vec(), Some(b"raw".to_vec())))
        }
    } else {
        let other = input.below(count);
        let own = directory.file_name().map(|name| name.display().to_string()).unwrap_or_default();
        let name: Vec<u8> = match input.byte() % 32 {
            0..=5 => format!("{other}.qcow2").into(),
            6 | 7 => format!("./{other}.qcow2").into(),
            8 | 9 => format!("../{own}/{other}.qcow2").into(),
            10 | 11 => format!("{here}/sub/../{other}.qcow2").into(),
            12 | 13 => b"base.raw".into(),
            14 | 15 => b"link".into(),
            16 => b"loop".into(),
            17 => b"sub/link".into(),
            18 => b"out".into(),
            19 => b"fifo".into(),
            20 => b"sub".into(),
            21 => b"sub/missing".into(),
            22 => b"/dev/null".into(),
            23 => br#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}"#.into(),
            24 => b"file:base.raw".into(),
            25 => b"nbd://localhost/base.raw".into(),
            26 => b"base.raw\0/etc/passwd".into(),
            27 => b"base.raw\n".into(),
            28 => b"a\xff".into(),
            29 => vec![b'a'; 1 + input.below(330) as usize],
            _ => input.rest().iter().take(16).copied().collect(),
        };
        let format: Option<&[u8]> = match input.byte() % 8 {
            0 => None,
            1..=4 => Some(b"qcow2"),
            5 | 6 => Some(b"raw"),
            _ => Some(input.pick(&[&b"vmdk"[..], b"", b"RAW", b"qcow2\0", b"json:{}"])),
        };
        let named = !name.is_empty() && !input.one_in(16);
        named.then(|| (name, format.map(<[u8]>::to_vec)))
    };
    let clusters = 1 + input.below(12);
    let shape = Shape {
        version: 3,
        bits: 9,
        order: 4,
        zstd: false,
        extended: false,
        size: clusters * 512,
        l1_slack: 0,
        backing: backing.clone(),
    };
    let kinds: Vec<Kind> = (0..clusters)
        .map(|_| match input.byte() % 4 {
            0 => Kind::Data(input.byte()),
            1 => Kind::Zero,
            _ => Kind::Unallocated,
        })
        .collect();
    Image { bytes: build(&shape, &kinds, [0, 0]), backing }
}

/// Parses the format in a header extension. QEMU reads it as a C string: it ends at its first NUL,
/// and an empty one means no format. Fails for a format that the program does not know.
fn known(format: Option<&[u8]>) -> Result<Option<BackingFormat>, ()> {
    match format.and_then(|text| text.split(|&byte| byte == 0).next()) {
        None | Some(b"") => Ok(None),
        Some(b"raw") => Ok(Some(BackingFormat::Raw)),
        Some(b"qcow2") => Ok(Some(BackingFormat::Qcow2)),
        Some(_) => Err(()),
    }
}

/// Returns the chain that the rules allow: its files, top first, each with the content that is read
/// through it. `None` if the chain must be refused.
fn expected(
    images: &[Image],
    overlay: (u64, u64),
    first: (&str, Option<BackingFormat>),
    directory: &Path,
) -> Option<Vec<(PathBuf, Vec<u8>)>> {
    let mut taken = vec![overlay];
    let mut files: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    let mut next = Some((first.0.to_string(), first.1));
    while let Some((name, format)) = next {
        let start = name.split('/').next().unwrap_or_default();
        if files.len() == MAX_LAYERS
            || name.is_empty()
            || name.chars().any(char::is_control)
            || start.contains(':')
        {
            return None;
        }
        // All images lie in the same directory, and links to them are opened in the directory of
        // the link.
        let above = files.last().map_or(directory, |(path, _)| path.parent().unwrap_or(directory));
        let path = above.join(&name);
        let found = fs::metadata(&path).ok().filter(|found| found.is_file())?;
        if taken.contains(&(found.dev(), found.ino())) {
            return None;
        }
        taken.push((found.dev(), found.ino()));
        let bytes = fs::read(&path).ok()?;
        next = match format? {
            BackingFormat::Raw => None,
            BackingFormat::Qcow2 => {
                let image = images.iter().find(|image| image.bytes == bytes)?;
                match &image.backing {
                    None => None,
                    Some((name, format)) => Some((
                        String::from_utf8(name.clone()).ok()?,
                        known(format.as_deref()).ok()?,
                    )),
                }
            }
        };
        files.push((path, bytes));
        if next.is_none() {
            // From the bottom up, each image is read above the content below it.
            let mut below: Option<Vec<u8>> = None;
            for (_, bytes) in files.iter_mut().rev() {
                // Only the last layer can be raw; `format` still holds the format of that layer.
                let is_raw = below.is_none() && format == Some(BackingFormat::Raw);
                if !is_raw {
                    *bytes = Layout::rough(bytes)?
                        .content(bytes, below.as_deref().unwrap_or_default())
                        .ok()?;
                }
                let content = bytes.clone();
                below = Some(content);
            }
        }
    }
    Some(files)
}

fn read(chain: &Chain, expected: &[(PathBuf, Vec<u8>)]) {
    let layers = chain.layers();
    assert!(
        layers.len() == expected.len() && layers.len() <= MAX_LAYERS,
        "{} layers instead of {}",
        layers.len(),
        expected.len()
    );
    for (layer, (path, content)) in layers.iter().zip(expected) {
        assert_eq!(layer.path.canonicalize().ok(), path.canonicalize().ok());
        assert_eq!(layer.size, content.len() as u64, "{}", path.display());
    }
    for (depth, (_, content)) in expected.iter().enumerate() {
        let rest = chain.below(depth).expect("so many layers");
        let mut buf = vec![0xee; content.len() + 700];
        rest.read(0, &mut buf).unwrap_or_else(|error| panic!("{error}"));
        assert!(buf[..content.len()] == content[..], "layer {depth} reads as something else");
        assert!(
            buf[content.len()..].iter().all(|byte| *byte == 0),
            "past the end of layer {depth}"
        );
    }
    let mut at = 0;
    while at < chain.size() {
        let (content, len) = chain
            .content(usize::MAX, at, chain.size() - at)
            .unwrap_or_else(|error| panic!("{error}"));
        assert!(len > 0 && len <= chain.size() - at);
        let bytes = &expected[0].1[at as usize..(at + len) as usize];
        assert!(
            content == Content::Data || bytes.iter().all(|byte| *byte == 0),
            "{len} bytes at {at} are not zero"
        );
        at += len;
    }
    assert!(chain.below(expected.len()).is_none());
}
