//! Compressed clusters (specification: "Compressed Clusters"): raw deflate with a 12-bit window, or
//! zstd frames.
//!
//! The bytes come from the image and are not trusted: memory is bounded by the cluster size and
//! [`MAX_WINDOW`].

use std::io::Read;

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::{CompressionType, FormatError};

/// The largest accepted zstd window, in bytes. It is the window that zstd's documentation asks
/// every decoder to support, and four times the largest cluster.
const MAX_WINDOW: u64 = 8 << 20;

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
fn zstd(mut input: &[u8], output: &mut [u8]) -> Result<(), FormatError> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_WINDOW);
    let mut filled = 0;
    while filled < output.len() {
        match decoder.reset(&mut input) {
            Ok(()) => filled += zstd_frame(&mut decoder, &mut input, &mut output[filled..])?,
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length,
                ..
            })) => {
                input = input.get(length as usize..).unwrap_or_default();
            }
            Err(error) => return corrupt(format!("zstd frame is broken: {error}")),
        }
    }
    Ok(())
}

/// Decodes one frame to its end and returns the number of decompressed bytes. Decodes block by
/// block, so that memory holds no more than a window and a block.
fn zstd_frame(
    decoder: &mut FrameDecoder,
    input: &mut &[u8],
    output: &mut [u8],
) -> Result<usize, FormatError> {
    let mut filled = 0;
    while !decoder.is_finished() {
        if let Err(error) = decoder.decode_blocks(&mut *input, BlockDecodingStrategy::UptoBlocks(1))
        {
            return corrupt(format!("zstd frame is broken: {error}"));
        }
        loop {
            match decoder.read(&mut output[filled..]) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(error) => return corrupt(format!("zstd frame is broken: {error}")),
            }
        }
        if decoder.can_collect() > 0 {
            return corrupt(format!(
                "zstd frame has more than the {} bytes there is room for",
                output.len()
            ));
        }
    }
    Ok(filled)
}

fn corrupt<T>(text: String) -> Result<T, FormatError> {
    Err(FormatError::Corrupt(format!("compressed cluster: {text}")))
}

#[cfg(test)]
mod tests;
