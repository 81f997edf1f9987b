//! `cordisk check`: reports what is wrong with an image, in the words of `qemu-img check`.
//!
//! **Touches:** `storage` for the file, `image` for the walk. **Never:** opens a backing file;
//! changes anything in an image that has corruptions. **Locks:** the image is locked with QEMU's
//! locks: no other program may write it during a check or use it during a repair.
//! **Invariants:** a repair only lowers refcounts that are higher than the number of references,
//! through the write-back pass. If it is killed at any moment, it leaves leaks at worst.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use serde::Serialize;

use crate::image::{CheckReport, Image, LeakSearch};
use host::error::Context;
use host::storage::{Access, FileStorage};
use host::{Error, ErrorKind, Result};

/// Findings that are printed, at most. A corrupt image can have more than a user can read.
const PRINTED: usize = 100;

/// Exit status: the check could not be completed.
const FAILED: u8 = 1;
/// Exit status: there are corruptions.
const CORRUPTIONS: u8 = 2;
/// Exit status: there are leaks and no corruptions.
const LEAKS: u8 = 3;

/// Options of `cordisk check`.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// Path of the image.
    pub image: PathBuf,
    /// What to repair, if anything.
    pub repair: Option<Repair>,
    /// Format of the result.
    pub output: Output,
}

/// Defects that can be repaired.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Repair {
    /// Refcounts that are too high.
    Leaks,
}

/// Format of the result.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Output {
    /// Sentences for a user.
    Human,
    /// One JSON object.
    Json,
}

/// Result of a check and of its repair, if any.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Checked {
    /// The report on the image as it is now.
    pub report: CheckReport,
    /// Number of leaked clusters that were given back.
    pub leaks_fixed: u64,
    /// The report from before the repair; empty if there was no repair.
    repaired: CheckReport,
    /// The reason why some or all leaks were not repaired although a repair was requested.
    refused: Option<&'static str>,
}

/// Why no leak is repaired beside a corruption: if the references are not known for certain,
/// unreferenced clusters are not known either. (qemu-img repairs leaks even then.)
const CORRUPT: &str = "the leaks were not repaired: an image with corruptions is not written to; repair a copy with qemu-img check -r all";
/// Why a leak remains in a sound image.
const SHARED: &str = "leaks that are left belong to clusters whose only reference does not say COPIED; qemu-img check -r leaks changes that";

/// Checks an image, prints the findings to standard error and the result to standard output, and
/// returns the exit status: 0, or that of [`Checked::status`].
///
/// # Errors
/// As [`check`].
pub fn run(options: &CheckOptions) -> Result<ExitCode> {
    let checked = check(options)?;
    let mut details = String::new();
    checked.details(&mut details);
    let mut text = String::new();
    match options.output {
        Output::Human => checked.sentences(&mut text),
        Output::Json => checked.json(&options.image, &mut text)?,
    }
    std::io::stderr().write_all(details.as_bytes()).context(|| "standard error")?;
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::standard_output)?;
    Ok(ExitCode::from(checked.status()))
}

/// Checks an image and repairs it if that is requested, possible and safe.
///
/// # Errors
/// The image cannot be opened or read, another program uses it, or it is of a kind that cannot be
/// checked or not be repaired.
pub fn check(options: &CheckOptions) -> Result<Checked> {
    let what = || options.image.display().to_string();
    let access = if options.repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
    let storage = Arc::new(FileStorage::open(&options.image, access)?);
    // The check must read the disk, not the host's cached pages.
    crate::image::distrust(&*storage).context(what)?;
    let report = crate::image::check(&*storage).context(what)?;
    if options.repair.is_none() || report.leaks == 0 || !report.is_sound() {
        let refused = (options.repair.is_some() && report.leaks > 0).then_some(CORRUPT);
        return Ok(Checked { report, leaks_fixed: 0, repaired: CheckReport::default(), refused });
    }
    repair_leaks(Arc::clone(&storage)).context(what)?;
    let after = crate::image::check(&*storage).context(what)?;
    let leaks_fixed = report.leaks.saturating_sub(after.leaks);
    let repaired = if leaks_fixed > 0 { report } else { CheckReport::default() };
    let refused = (after.leaks > 0).then_some(SHARED);
    Ok(Checked { report: after, leaks_fixed, repaired, refused })
}

/// Lowers the refcounts of leaked clusters. Refuses images whose header [`Image::open`] refuses to
/// write, except for a backing file of an unsupported format: a repair reads nothing of the backing
/// file and changes no cluster that the guest can read.
fn repair_leaks(storage: Arc<FileStorage>) -> Result<()> {
    let image = Image::open_to_repair(storage)?;
    image.start_writing(LeakSearch::Always)?;
    image.close()?;
    image.end_writing();
    Ok(())
}

impl Checked {
    /// Returns the exit status of `qemu-img check`: 0 no defects, 1 parts could not be checked, 2
    /// corruptions, 3 leaks only.
    pub fn status(&self) -> u8 {
        match &self.report {
            report if report.check_errors > 0 => FAILED,
            report if report.corruptions > 0 => CORRUPTIONS,
            report if report.leaks > 0 => LEAKS,
            _ => 0,
        }
    }

    /// Appends one line for each defect that is present or was repaired.
    fn details(&self, text: &mut String) {
        for report in [&self.repaired, &self.report] {
            for finding in report.findings.iter().take(PRINTED) {
                *text += &format!("{finding}\n");
            }
            let more = report.findings.len().saturating_sub(PRINTED) as u64 + report.not_listed;
            if more > 0 {
                *text += &format!("... and {more} more\n");
            }
        }
        if let Some(why) = self.refused {
            *text += &format!("cordisk: {why}\n");
        }
        if self.report.check_errors > 0 {
            *text += "cordisk: check failed: parts of the image could not be checked\n";
        }
    }

    fn sentences(&self, text: &mut String) {
        let report = &self.report;
        if self.leaks_fixed > 0 {
            *text += &format!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    0 corruptions\n\n\
                 Double checking the fixed image now...\n",
                self.leaks_fixed
            );
        }
        if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
            *text += "No errors were found on the image.\n";
        }
        if report.corruptions > 0 {
            *text += &format!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
                report.corruptions
            );
        }
        if report.leaks > 0 {
            *text += &format!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
                report.leaks
            );
        }
        if report.check_errors > 0 {
            *text += &format!(
                "\n{} internal errors have occurred during the check.\n",
                report.check_errors
            );
        }
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let (allocated, total) = (report.allocated_clusters, report.total_clusters);
        if allocated > 0 && total > 0 {
            *text += &format!(
                "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
                percent(allocated, total),
                percent(report.fragmented_clusters, allocated),
                percent(report.compressed_clusters, allocated)
            );
        }
        if report.image_end > 0 {
            *text += &format!("Image end offset: {}\n", report.image_end);
        }
    }

    fn json(&self, image: &Path, text: &mut String) -> Result<()> {
        let some = |number: u64| (number > 0).then_some(number);
        let report = &self.report;
        let object = Json {
            image_end_offset: some(report.image_end),
            total_clusters: some(report.total_clusters),
            check_errors: report.check_errors,
            corruptions: some(report.corruptions),
            leaks: some(report.leaks),
            leaks_fixed: some(self.leaks_fixed),
            allocated_clusters: some(report.allocated_clusters),
            fragmented_clusters: some(report.fragmented_clusters),
            compressed_clusters: some(report.compressed_clusters),
            filename: image.to_string_lossy().into_owned(),
            format: "qcow2",
        };
        let mut bytes = Vec::new();
        let layout = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        object
            .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, layout))
            .map_err(|error| Error::wrap(ErrorKind::Io, "JSON", error))?;
        *text += &String::from_utf8_lossy(&bytes);
        text.push('\n');
        Ok(())
    }
}

/// The members of `qemu-img check --output=json` (QEMU: `qapi/block-core.json`, ImageCheck). Counts
/// that are zero are omitted, as QEMU does. So is `corruptions-fixed`, because `cordisk check`
/// fixes no corruptions.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    #[serde(skip_serializing_if = "Option::is_none")]
    image_end_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_clusters: Option<u64>,
    check_errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    corruptions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    leaks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    leaks_fixed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated_clusters: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fragmented_clusters: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compressed_clusters: Option<u64>,
    filename: String,
    format: &'static str,
}
