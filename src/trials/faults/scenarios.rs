//! The scenarios: the content of the disk, the steps before the host begins to fail, and the steps
//! after that.

use super::rig::{Files, Step};
use super::sketch::{Guest, Shape, Sketch, base};

/// One scenario for one shape.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub name: &'static str,
    pub shape: Shape,
    pub copy_on_read: bool,
    /// Whether clusters can be cloned from the base.
    pub clones: bool,
    /// Whether a step locks the whole disk, so that every read waits as well.
    pub drains: bool,
    pub overlay: Sketch,
    pub middle: Option<Sketch>,
    pub before: Vec<Step>,
    pub steps: Vec<Step>,
}

pub(super) const SMALL: Shape =
    Shape { name: "v3-512", version: 3, cluster_bits: 9, refcount_order: 4, clusters: 256 };
pub(super) const SMALL_V2: Shape =
    Shape { name: "v2-512", version: 2, cluster_bits: 9, refcount_order: 4, clusters: 256 };
/// A shape with few refcounts in a block and few blocks in a table.
pub(super) const WIDE: Shape =
    Shape { name: "v3-512-64", version: 3, cluster_bits: 9, refcount_order: 6, clusters: 256 };
pub(super) const PAGE: Shape =
    Shape { name: "v3-4k", version: 3, cluster_bits: 12, refcount_order: 4, clusters: 528 };
pub(super) const USUAL: Shape =
    Shape { name: "v3-64k", version: 3, cluster_bits: 16, refcount_order: 4, clusters: 16 };

impl Scenario {
    fn new(name: &'static str, shape: Shape, steps: Vec<Step>) -> Scenario {
        let overlay = Sketch::usual(shape);
        Scenario {
            name,
            shape,
            copy_on_read: false,
            clones: false,
            drains: false,
            overlay,
            middle: None,
            before: Vec::new(),
            steps,
        }
    }

    fn copying(self) -> Scenario {
        Scenario { copy_on_read: true, ..self }
    }

    fn cloning(self) -> Scenario {
        Scenario { clones: true, ..self }
    }

    fn draining(self) -> Scenario {
        Scenario { drains: true, ..self }
    }

    fn after(self, before: Vec<Step>) -> Scenario {
        Scenario { before, ..self }
    }

    fn with(mut self, change: impl FnOnce(&mut Sketch)) -> Scenario {
        change(&mut self.overlay);
        self
    }

    pub fn files(&self) -> Files {
        Files::new(&self.overlay, self.middle.as_ref(), base(&self.shape))
    }
}

/// Returns all scenarios that fit a shape.
pub(super) fn all(shape: Shape) -> Vec<Scenario> {
    let mut list = reads(shape);
    list.extend(writes(shape));
    list.extend(zeros(shape));
    list.extend(flushes(shape));
    list.extend(streams(shape));
    list.extend(lives(shape));
    list
}

fn reads(shape: Shape) -> Vec<Scenario> {
    let c = shape.cluster();
    let read = |name, range| Scenario::new(name, shape, vec![Step::Read(range)]);
    let mut list = vec![
        read("read-unallocated", 10..2 * c),
        read("read-every-kind", 0..12 * c),
        read("copy-on-read-old-table", c / 2..c + 100).copying(),
        read("copy-on-read-every-kind", c / 2..12 * c - 7).copying(),
        read("copy-on-read-tail", shape.tail() * c - 100..(shape.tail() + 2) * c).copying(),
        read("copy-on-read-zeros", 10 * c..11 * c).copying(),
        read("copy-on-read-many-refcount-blocks", 0..c)
            .copying()
            .with(|sketch| sketch.pad = shape.refblock_entries().min(512) + 10),
        Scenario::new(
            "copy-on-read-and-flush",
            shape,
            vec![Step::Read(0..2 * c), Step::Flush, Step::Read(0..2 * c)],
        )
        .copying(),
    ];
    if shape.clusters > shape.l2_entries() {
        let at = shape.l2_entries() * c + c / 2;
        list.push(
            Scenario::new(
                "copy-on-read-new-table",
                shape,
                vec![Step::Read(at..at + c), Step::Flush],
            )
            .copying(),
        );
    }
    list
}

fn writes(shape: Shape) -> Vec<Scenario> {
    let c = shape.cluster();
    let write =
        |name, range| Scenario::new(name, shape, vec![Step::Write(range, 0x5a), Step::Flush]);
    let mut list = vec![
        write("write-whole-unallocated", 0..c),
        write("write-part-unallocated", 100..c - 100),
        write("write-many-unallocated", c / 2..2 * c - 3),
        write("write-whole-own", 2 * c..3 * c),
        write("write-part-own", 2 * c + 100..3 * c - 100),
        write("write-many-own", 2 * c + 9..4 * c - 9),
        write("write-whole-shared", 4 * c..5 * c),
        write("write-part-shared", 4 * c + 100..5 * c - 100),
        write("write-many-shared", 4 * c + 9..6 * c - 9),
        write("write-whole-compressed", 6 * c..7 * c),
        write("write-part-compressed", 6 * c + 100..7 * c - 100),
        write("write-many-compressed", 6 * c + 9..8 * c - 9),
        write("write-every-kind", 9..12 * c - 9),
        write("write-tail", shape.tail() * c + 10..(shape.tail() + 1) * c + 10),
        write("write-shared-table", 9..4 * c - 9).with(|sketch| sketch.shared_tables = true),
        write("write-new-refcount-block", 0..2 * c)
            .with(|sketch| sketch.pad = shape.refblock_entries().min(512)),
    ];
    if shape.version >= 3 {
        list.extend([
            write("write-whole-zero", 8 * c..9 * c),
            write("write-part-zero", 8 * c + 100..9 * c - 100),
            write("write-whole-zero-kept", 9 * c..10 * c),
            write("write-part-zero-kept", 9 * c + 100..10 * c - 100),
            write("write-many-zero", 8 * c + 100..10 * c - 100),
        ]);
    }
    let border = shape.l2_entries() * c;
    if shape.clusters > shape.l2_entries() {
        list.push(write("write-new-table", border + 9..border + c + 9));
        list.push(write("write-across-tables", border - c + 10..border + c + 20));
    }
    if shape.refcount_order == 6 {
        let steps = vec![
            Step::Write(0..2 * c, 0x5a),
            Step::Flush,
            Step::Write(border..border + 2 * c, 0x33),
            Step::Flush,
        ];
        let full = shape.cluster() / 8 * shape.refblock_entries();
        list.push(
            Scenario::new("write-larger-refcount-table", shape, steps)
                .with(|sketch| sketch.pad = full),
        );
    }
    list
}

fn zeros(shape: Shape) -> Vec<Scenario> {
    let c = shape.cluster();
    let all = |name, step| Scenario::new(name, shape, vec![step, Step::Flush]);
    vec![
        all("discard", Step::Discard(0..10 * c)),
        all("discard-unaligned", Step::Discard(c / 2..9 * c + c / 3)),
        all("discard-without-backing", Step::Discard(0..10 * c))
            .with(|sketch| sketch.backing = None),
        all("discard-shared-table", Step::Discard(0..4 * c))
            .with(|sketch| sketch.shared_tables = true),
        all("write-zeroes", Step::Zero(0..10 * c)),
        all("write-zeroes-unaligned", Step::Zero(c / 2..9 * c + c / 3)),
        all("write-zeroes-tail", Step::Zero(shape.tail() * c + 10..(shape.tail() + 2) * c + 10)),
    ]
}

fn flushes(shape: Shape) -> Vec<Scenario> {
    let c = shape.cluster();
    let (first, second) = (Step::Write(0..2 * c, 0x5a), Step::Write(4 * c + 9..7 * c, 0x33));
    let pending = vec![first.clone(), second.clone(), Step::Discard(2 * c..4 * c)];
    let new = |name, steps| Scenario::new(name, shape, steps);
    vec![
        new("flush-pending", vec![Step::Flush]).after(pending.clone()),
        new(
            "write-through",
            vec![first.clone(), Step::Flush, Step::Write(100..c, 0x77), Step::Flush],
        ),
        new(
            "flush-after-failed-flush",
            vec![Step::Flush, second.clone(), Step::Flush, Step::Close],
        )
        .after(vec![first.clone()]),
        new(
            "write-after-failed-write",
            vec![first.clone(), Step::Write(c / 2..3 * c, 0x77), second, Step::Flush],
        ),
        new("close-after-discards", vec![Step::Close]).after(vec![Step::Discard(2 * c..8 * c)]),
        new("close-pending", vec![Step::Close]).after(pending),
        new(
            "use-again-what-was-freed",
            vec![first, Step::Flush, Step::Write(10 * c..12 * c, 1), Step::Flush],
        )
        .after(vec![Step::Discard(2 * c..8 * c), Step::Flush]),
    ]
}

fn streams(shape: Shape) -> Vec<Scenario> {
    let c = shape.cluster();
    let stream = |depth, pause| Step::Stream { depth, pause };
    let mut middle =
        Sketch { guests: vec![Guest::Nothing; shape.clusters as usize], ..Sketch::usual(shape) };
    for cluster in [1, 2, 5, 11] {
        middle.guests[cluster] = Guest::Own;
    }
    let written = vec![Step::Write(c / 2..c + 9, 0x5a), Step::Discard(2 * c..3 * c)];
    let intermediate =
        Scenario::new("stream-to-intermediate", shape, vec![stream(Some(1), false)]).draining();
    let cloned =
        Scenario::new("stream-cloned-from-under-a-layer", shape, vec![stream(None, false)])
            .draining()
            .cloning();
    vec![
        Scenario::new("stream", shape, vec![stream(None, false)]).draining(),
        Scenario::new("stream-paused", shape, vec![stream(None, true)]).draining(),
        Scenario::new(
            "stream-and-writes",
            shape,
            vec![stream(None, false), Step::Write(0..2 * c, 1), Step::Flush],
        )
        .draining()
        .after(written.clone()),
        Scenario::new("stream-cloned", shape, vec![stream(None, false)]).draining().cloning(),
        Scenario::new(
            "stream-cloned-and-writes",
            shape,
            vec![stream(None, true), Step::Write(0..2 * c, 1), Step::Flush],
        )
        .draining()
        .cloning()
        .after(written),
        Scenario {
            middle: Some(middle.clone()),
            ..cloned.with(|sketch| sketch.backing = Some("middle.qcow2"))
        },
        Scenario {
            middle: Some(middle),
            ..intermediate.with(|sketch| sketch.backing = Some("middle.qcow2"))
        },
    ]
}

fn lives(shape: Shape) -> Vec<Scenario> {
    let c = shape.cluster();
    let new = |name, steps| Scenario::new(name, shape, steps);
    let larger = (shape.clusters + 3) * c;
    // A disk of `much_larger` bytes needs an L1 table of more clusters.
    let much_larger = (c / 8 + 1) * shape.l2_entries() * c;
    let mut list = vec![
        new(
            "grow",
            vec![Step::Grow(larger), Step::Write(shape.size() - 100..larger, 1), Step::Flush],
        )
        .draining(),
        new("open-and-close", vec![Step::Close, Step::Open, Step::Write(0..c, 1), Step::Close]),
        new("open", vec![Step::Open, Step::Read(0..c), Step::Close]),
        new(
            "read-write-discard-close",
            vec![
                Step::Read(0..2 * c),
                Step::Write(c / 2..3 * c, 0x5a),
                Step::Discard(4 * c..7 * c),
                Step::Flush,
                Step::Zero(2 * c..5 * c),
                Step::Read(10 * c..12 * c),
                Step::Write(6 * c + 1..11 * c, 0x77),
                Step::Close,
            ],
        )
        .copying(),
    ];
    if shape.cluster_bits == 9 {
        // The refcount block that counts the old L1 table is not in memory when that table is
        // freed.
        let pad = 2 * shape.refblock_entries();
        list.push(
            new("grow-many-refcount-blocks", vec![Step::Grow(larger), Step::Flush])
                .draining()
                .with(|sketch| sketch.pad = pad),
        );
    }
    if shape.refcount_order == 6 {
        list.push(
            new("grow-much", vec![Step::Grow(much_larger), Step::Write(0..2 * c, 1), Step::Flush])
                .draining(),
        );
    }
    if shape.version >= 3 {
        let steps = vec![Step::Open, Step::Write(0..c, 1), Step::Close];
        list.push(
            new("open-with-unknown-autoclear-bits", steps)
                .with(|sketch| sketch.autoclear = 1 << 40),
        );
    }
    list
}
