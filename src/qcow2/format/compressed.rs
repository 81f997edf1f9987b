//! Compressed clusters (specification: "Compressed Clusters"): raw deflate with a 12-bit window, or
//! zstd frames.
//!
//! The bytes come from the image and are not trusted: memory is bounded by the cluster size and
//! [`MAX_WINDOW_LOG`].

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::{CompressionType, FormatError};

/// log2 of the largest zstd window, in bytes, for which memory is taken. 8 MiB is the window that
/// zstd's documentation asks every decoder to support, and four times the largest cluster. A frame
/// whose header states the length of its content needs no window if the content fits the cluster.
const MAX_WINDOW_LOG: u32 = 23;

/// Decompresses one cluster. `input` may continue after the compressed bytes, because the format
/// counts in sectors. `output` is one cluster, and the compressed bytes must fill exactly that.
/// After an error the content of `output` is undefined.
///
/// # Errors
/// [`FormatError::Corrupt`] if `input` is not a cluster of `kind`.
pub fn decompress(
    kind: CompressionType,
    input: &[u8],
    output: &mut [u8],
) -> Result<(), FormatError> {
    match kind {
        CompressionType::Zlib => inflate(input, output),
        CompressionType::Zstd => zstd(input, output),
    }
}

/// Decompresses a deflate stream. As in QEMU, the output must be full, and the stream need not mark
/// its end there.
///
/// libdeflate is the fastest decoder, but it decodes only streams that end where the output is
/// full. zlib-rs decodes all others again: it stops where the output is full, and its errors say
/// what is wrong with a stream.
fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), FormatError> {
    let decoded = libdeflater::Decompressor::new().deflate_decompress(input, output);
    if decoded == Ok(output.len()) {
        return Ok(());
    }
    let mut stream = flate2::Decompress::new(false);
    let len = output.len() as u64;
    match stream.decompress(input, output, flate2::FlushDecompress::Finish) {
        Ok(_) if stream.total_out() == len => Ok(()),
        Ok(_) => {
            corrupt(format!("deflate stream has {} bytes instead of {len}", stream.total_out()))
        }
        Err(error) => corrupt(format!("deflate stream is broken: {error}")),
    }
}

/// Decompresses zstd frames. As in QEMU, frames are read one after the other until the output is
/// full, and the last frame must end exactly there.
fn zstd(input: &[u8], output: &mut [u8]) -> Result<(), FormatError> {
    let broken = |code| corrupt(format!("zstd frame is broken: {}", get_error_name(code)));
    let Some(mut decoder) = DCtx::try_create() else {
        return corrupt("no memory to decode zstd".into());
    };
    if let Err(code) = decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)) {
        return broken(code);
    }
    let len = output.len();
    let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(output));
    let mut is_frame_over = false;
    while output.pos() < len {
        if input.pos == input.src.len() {
            return corrupt(format!("zstd frames have {} bytes instead of {len}", output.pos()));
        }
        match decoder.decompress_stream(&mut output, &mut input) {
            Ok(more) => is_frame_over = more == 0,
            Err(code) => return broken(code),
        }
    }
    if is_frame_over {
        Ok(())
    } else {
        corrupt(format!("zstd frame has more than the {len} bytes there is room for"))
    }
}

fn corrupt<T>(text: String) -> Result<T, FormatError> {
    Err(FormatError::Corrupt(format!("compressed cluster: {text}")))
}

#[cfg(test)]
mod tests;
