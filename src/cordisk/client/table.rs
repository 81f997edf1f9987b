//! Disks in a table, one line each.
//!
//! Written by hand: widths and padding, which a crate for tables would do, take fifteen lines.

use std::path::Path;

use super::show::Paint;
use host::error::one_line;

/// The cells of one disk. An unknown value is empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) mountpoint: String,
    /// `running`, `hung`, `failed` or `dead`.
    pub(super) state: &'static str,
    pub(super) size: String,
    /// The part of the non-zero data that is local, in percent.
    pub(super) local: String,
    pub(super) job: String,
    pub(super) image: String,
}

impl Row {
    pub(super) fn new(mountpoint: &Path, state: &'static str, image: &Path) -> Row {
        let text = |path: &Path| one_line(&path.display().to_string());
        Row { mountpoint: text(mountpoint), state, image: text(image), ..Row::default() }
    }
}

/// Formats the table, with a heading and without a newline at its end. Each column is as wide as
/// its longest cell.
pub(super) fn table(rows: &[Row], paint: Paint) -> String {
    let heading = ["MOUNTPOINT", "STATE", "SIZE", "LOCAL", "JOB", "IMAGE"].map(str::to_owned);
    let cells = |row: &Row| {
        let state = row.state.to_owned();
        [
            row.mountpoint.clone(),
            state,
            row.size.clone(),
            row.local.clone(),
            one_line(&row.job),
            row.image.clone(),
        ]
    };
    let lines: Vec<[String; 6]> = std::iter::once(heading).chain(rows.iter().map(cells)).collect();
    let mut widths = [0; 6];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        let mut columns: Vec<String> = Vec::new();
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            // Numbers are aligned to the right; the last column is not padded.
            let padded = match column {
                2 | 3 => format!("{cell:>width$}"),
                5 => cell.clone(),
                _ => format!("{cell:<width$}"),
            };
            columns.push(match (index, column, cell.as_str()) {
                (0, _, _) => paint.bold(&padded),
                (_, 1, "running") => paint.green(&padded),
                (_, 1, _) => paint.red(&padded),
                _ => padded,
            });
        }
        text += columns.join("  ").trim_end();
        text.push('\n');
    }
    text.pop();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let running = Row {
            size: "10 GiB".into(),
            local: "31.0 %".into(),
            job: "stream 45 %, 50 MiB/s".into(),
            ..Row::new(Path::new("/srv/vm.raw"), "running", Path::new("/srv/vm.qcow2"))
        };
        let dead = Row::new(Path::new("/x"), "dead", Path::new("/y"));
        let want = "\
MOUNTPOINT   STATE      SIZE   LOCAL  JOB                    IMAGE
/srv/vm.raw  running  10 GiB  31.0 %  stream 45 %, 50 MiB/s  /srv/vm.qcow2
/x           dead                                            /y";
        assert_eq!(table(&[running, dead], Paint::none()), want);
    }
}
