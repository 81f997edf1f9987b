use proptest::prelude::*;

use super::*;
use crate::stream::plan::Minute;
use qcow2::format::{BackingFormat, BackingReference};

fn note() -> Note {
    Note {
        file: None,
        backing: None,
        job_id: None,
        base: None,
        speed: 0,
        plan: None,
        on_error: OnError::Report,
        auto_finalize: true,
        auto_dismiss: true,
        backing_file: None,
        request: String::new(),
        paused: false,
        offset: 0,
        len: 1 << 30,
    }
}

fn layer(name: &str, path: &str) -> LayerInfo {
    LayerInfo {
        reference: BackingReference { name: name.into(), format: None },
        path: path.into(),
        format: BackingFormat::Qcow2,
        size: 1 << 30,
        allocated_size: 0,
        cluster_size: None,
        qcow2: None,
        identity: None,
        file_size: 0,
        is_remote: false,
        block_device: false,
        deleted: false,
        changed: false,
    }
}

fn plans() -> impl Strategy<Value = Option<Plan>> {
    let minute =
        || (0u16..24, 0u16..60).prop_map(|(hour, minute)| format!("{hour:02}:{minute:02}"));
    let schedule =
        proptest::collection::btree_map(minute(), 0u64..1 << 40, 1..20).prop_map(|entries| {
            let entries: Vec<String> =
                entries.into_iter().map(|(minute, speed)| format!("{minute}={speed}")).collect();
            Some(Plan::Schedule(entries.join(",").parse().unwrap()))
        });
    let finish_by = (minute(), 0i64..1 << 36).prop_map(|(minute, deadline)| {
        let at: Minute = minute.parse().unwrap();
        Some(Plan::FinishBy(FinishBy { at, deadline: Some(deadline) }))
    });
    prop_oneof![Just(None), schedule, finish_by]
}

fn files() -> impl Strategy<Value = Option<FileId>> {
    let text = |(system, inode, born): (Option<String>, u64, Option<String>)| {
        let mut file = serde_json::json!({ "inode": inode });
        system.into_iter().for_each(|system| file["file-system"] = system.into());
        born.into_iter().for_each(|born| file["born"] = born.into());
        serde_json::from_value(file).unwrap()
    };
    let parts = (
        proptest::option::of("[0-9a-f]{16}"),
        any::<u64>(),
        proptest::option::of("[0-9]{10}\\.[0-9]{9}"),
    );
    proptest::option::of(parts.prop_map(text))
}

prop_compose! {
    fn notes()(
        job_id in proptest::option::of("[a-zA-Z][a-zA-Z0-9._-]{0,127}"),
        base in proptest::option::of(("\\PC{0,80}", "\\PC{0,80}", 1usize..100)),
        speed in 0..=i64::MAX as u64,
        plan in plans(),
        on_error in 0..ON_ERROR.len(),
        flags in any::<[bool; 3]>(),
        backing_file in proptest::option::of("\\PC{0,60}"),
        backing in proptest::option::of("\\PC{0,60}"),
        file in files(),
        request in "\\PC{0,200}",
        offset in any::<u64>(),
        len in any::<u64>(),
    ) -> Note {
        let backing_file = backing_file.filter(|_| base.is_some());
        let base = base.map(|(name, path, layers)| NotedBase { name, path, layers });
        let [auto_finalize, auto_dismiss, paused] = flags;
        let on_error = ON_ERROR[on_error].0;
        Note { file, backing, job_id, base, speed, plan, on_error, auto_finalize, auto_dismiss, backing_file, request, paused, offset, len }
    }
}

proptest! {
    /// Protects: the stream that is started again has the arguments of the interrupted one.
    #[test]
    fn a_note_says_what_it_was_told(note in notes()) {
        let text = note.to_text().unwrap();
        prop_assert_eq!(Note::parse(text.as_bytes()).unwrap(), note);
    }

    /// Protects: a note with one changed byte is another valid note or is refused. It never panics,
    /// and never yields arguments that a client could not have requested.
    #[test]
    fn a_note_that_was_tampered_with_is_read_or_refused(note in notes(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut text = note.to_text().unwrap().into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        if let Ok(read) = Note::parse(&text) {
            prop_assert!(read.speed <= i64::MAX as u64);
            prop_assert!(read.job_id.as_deref().is_none_or(job::is_valid_id));
            prop_assert!(read.percent() <= 100);
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        prop_assert!(Note::parse(&bytes).is_err());
    }
}

#[test]
fn a_long_request_is_left_out_and_long_names_are_not_kept() {
    let long = Note { request: "r".repeat(LONGEST_STREAM_NOTE), ..note() };
    let text = long.to_text().unwrap();
    assert!(text.len() <= LONGEST_STREAM_NOTE);
    assert_eq!(Note::parse(text.as_bytes()).unwrap(), note());
    let path = "p".repeat(LONGEST_STREAM_NOTE);
    let base = Some(NotedBase { name: "base".into(), path, layers: 1 });
    assert!(Note { base, ..note() }.to_text().is_err());
}

#[test]
fn hostile_notes_are_refused_with_a_reason() {
    let with = |name: &str, value: serde_json::Value| {
        let mut text: serde_json::Value = serde_json::from_str(&note().to_text().unwrap()).unwrap();
        text[name] = value;
        text.to_string().into_bytes()
    };
    let base = || serde_json::json!({"name": "b", "path": "/b", "layers": 1});
    assert!(
        Note::parse(&with("base", base())).is_ok(),
        "the way of breaking notes does not break them itself"
    );
    let mut both = serde_json::from_slice::<serde_json::Value>(&with("base", base())).unwrap();
    both["backing-file"] = "a\nb".into();
    let deep = format!("{}{}", "[".repeat(1500), "]".repeat(1500)).into_bytes();
    for (bytes, why) in [
        (b"".to_vec(), "EOF"),
        (b"{}".to_vec(), "missing field"),
        (b"\xff\xfe".to_vec(), "expected"),
        (deep, "expected"),
        (vec![b' '; LONGEST_STREAM_NOTE + 1], "too long"),
        (with("version", 1.into()), "another version"),
        (with("version", 3.into()), "another version"),
        (with("file", serde_json::json!({"inode": 1, "path": "/x"})), "unknown field"),
        (with("file", serde_json::json!({"file-system": "1"})), "missing field"),
        (with("command", "rm".into()), "unknown field"),
        (with("job-id", "1; x".into()), "job-id"),
        (with("job-id", "a".repeat(LONGEST_ID + 1).into()), "job-id"),
        (with("speed", u64::MAX.into()), "speed"),
        (with("speed", (-1).into()), "invalid value"),
        (with("on-error", "explode".into()), "on-error"),
        (with("paused", "yes".into()), "invalid type"),
        (with("backing-file", "/etc/shadow".into()), "without a base"),
        (both.to_string().into_bytes(), "no name"),
        (
            with("base", serde_json::json!({"name": "b", "path": "/b", "layers": 0})),
            "does not stay",
        ),
        (
            with("base", serde_json::json!({"name": "b", "path": "/b", "layers": 1, "x": 1})),
            "unknown field",
        ),
        (with("schedule", "25:00=1".into()), "HH:MM"),
        (with("finish-by", "06:00".into()), "go together"),
        (with("deadline", i64::MAX.into()), "go together"),
    ] {
        let error = Note::parse(&bytes).unwrap_err().to_string();
        assert!(error.contains(why), "{}: {error}", String::from_utf8_lossy(&bytes));
    }
}

/// Protects: layers are counted from the lowest, so cutting away upper layers does not change the
/// base that a note names; another chain is recognized as such.
#[test]
fn a_base_is_found_again() {
    let chain = || {
        vec![
            layer("top.qcow2", "/d/top.qcow2"),
            layer("mid.qcow2", "/d/mid.qcow2"),
            layer("base.raw", "/d/base.raw"),
        ]
    };
    let of = |depth| Note { base: NotedBase::below(&chain(), depth), ..note() };
    assert_eq!(note().place(&chain()), BasePlace::Depth(None));
    assert_eq!(note().place(&[]), BasePlace::Over);
    assert_eq!(NotedBase::below(&chain(), 3), None);
    assert_eq!(of(1).place(&chain()), BasePlace::Depth(Some(1)));
    assert_eq!(of(2).place(&chain()), BasePlace::Depth(Some(2)));
    assert_eq!(of(1).place(&chain()[1..]), BasePlace::Over, "it was cut");
    assert_eq!(
        of(2).place(&chain()[1..]),
        BasePlace::Depth(Some(1)),
        "somebody else has cut away one layer"
    );
    assert_eq!(of(1).place(&[]), BasePlace::Elsewhere);
    assert_eq!(
        of(1).place(&chain()[2..]),
        BasePlace::Elsewhere,
        "more was cut than this one was to cut"
    );
    let moved: Vec<LayerInfo> =
        chain().iter().map(|layer_| layer(&layer_.reference.name, "/elsewhere")).collect();
    assert_eq!(of(1).place(&moved), BasePlace::Depth(Some(1)), "the directory was moved");
    let other = vec![
        layer("top.qcow2", "/d/top.qcow2"),
        layer("other.qcow2", "/d/other.qcow2"),
        layer("base.raw", "/d/base.raw"),
    ];
    assert_eq!(of(1).place(&other), BasePlace::Elsewhere);
    assert_eq!(
        of(2).place(&other),
        BasePlace::Depth(Some(2)),
        "which of them is copied up does not matter"
    );
    let renamed = Note { backing_file: Some("name".into()), ..of(1) };
    assert_eq!(
        renamed.place(&[layer("name", "/d/name"), layer("base.raw", "/d/base.raw")]),
        BasePlace::Over,
        "cut, and called as it was to be"
    );
    assert_eq!(
        of(1).place(&[layer("name", "/d/name"), layer("base.raw", "/d/base.raw")]),
        BasePlace::Elsewhere
    );
}

#[test]
fn percent_is_for_people() {
    let at = |offset, len| Note { offset, len, ..note() }.percent();
    assert_eq!((at(42, 100), at(0, 0), at(u64::MAX, 1), at(u64::MAX, u64::MAX)), (42, 0, 100, 100));
}
