use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use super::directory::Surroundings;
use super::*;
use host::ErrorKind;

fn entry() -> Entry {
    Entry {
        pid: std::process::id(),
        serving: None,
        mountpoint: "/srv/vm \u{e9}.raw".into(),
        image: "/srv/vm.qcow2".into(),
        device: "drive0".into(),
        qmp: "/run/x.sock".into(),
        filesystem: Some("0:52".into()),
        metrics: None,
    }
}

fn find_in(surroundings: &Surroundings) -> Vec<Found> {
    super::search::find_in(surroundings).collect()
}

fn surroundings(directory: &Path) -> Surroundings {
    Surroundings {
        uid: rustix::process::geteuid().as_raw(),
        outside: None,
        given: Some(directory.into()),
        of_session: None,
        of_users: directory.join("users"),
        fallback: directory.join("tmp"),
    }
}

#[test]
fn an_entry_comes_is_found_and_goes() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("run");
    let place = surroundings(&directory);
    let registration = Registration::begin_in(&place, std::process::id()).unwrap();
    assert_eq!(find_in(&place).len(), 0, "nothing is said before the disk is mounted");
    registration.publish(&entry()).unwrap();
    let found = find_in(&place);
    assert_eq!((found.len(), &found[0].entry), (1, &entry()));
    assert!(found[0].is_running());
    let file = directory.join(format!("{}.json", std::process::id()));
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o644);
    assert!(
        fs::read_to_string(&file).unwrap().ends_with("\"filesystem\":\"0:52\"}\n"),
        "absent is not null"
    );
    drop(registration);
    assert!(!file.exists() && !found[0].is_running());
}

#[test]
fn what_the_dead_left_goes_and_nothing_else() {
    let scratch = tempfile::tempdir().unwrap();
    let place = surroundings(scratch.path());
    let there = |name: &str| scratch.path().join(name).symlink_metadata().is_ok();
    for name in ["1.json", "2.json", "notes.json", "03.json", "4.txt", "5.sock"] {
        fs::write(scratch.path().join(name), "{}").unwrap();
    }
    drop(UnixListener::bind(scratch.path().join("1.sock")).unwrap());
    fs::write(scratch.path().join("2.sock"), "no socket").unwrap();
    symlink("notes.json", scratch.path().join("6.json")).unwrap();
    let held = LockedFile::acquire("entry", &scratch.path().join("7.json"), |_| Ok(String::new()))
        .unwrap();
    drop(UnixListener::bind(scratch.path().join("7.sock")).unwrap());
    let registration = Registration::begin_in(&place, std::process::id()).unwrap();
    assert!(!there("1.json") && !there("1.sock") && !there("2.json"));
    for name in ["2.sock", "notes.json", "03.json", "4.txt", "5.sock", "6.json", "7.json", "7.sock"]
    {
        assert!(there(name), "{name}");
    }
    drop((held, registration));
}

#[test]
fn a_directory_of_others_is_refused_with_what_to_do() {
    let scratch = tempfile::tempdir().unwrap();
    let why = |place: &Surroundings| {
        Registration::begin_in(place, std::process::id()).unwrap_err().to_string()
    };
    let open = scratch.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, PermissionsExt::from_mode(0o775)).unwrap();
    assert!(
        why(&surroundings(&open)).contains("others may write to it; chmod go-w"),
        "{}",
        why(&surroundings(&open))
    );
    let file = scratch.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(why(&surroundings(&file)).contains("no directory"));
    let link = scratch.path().join("link");
    symlink(scratch.path(), &link).unwrap();
    assert!(why(&surroundings(&link)).contains("no directory"));
    let somebody = Surroundings { uid: 4242, ..surroundings(scratch.path()) };
    assert!(why(&somebody).contains("belongs to user"), "{}", why(&somebody));
    let missing = surroundings(&scratch.path().join("a/b"));
    assert_eq!(
        Registration::begin_in(&missing, std::process::id()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn everybody_has_a_place() {
    let scratch = tempfile::tempdir().unwrap();
    let (session, users, tmp) =
        (scratch.path().join("session"), scratch.path().join("users"), scratch.path().join("tmp"));
    let me = scratch.path().metadata().unwrap().uid();
    let place = |uid, given: Option<&str>, session: Option<&Path>| Surroundings {
        uid,
        outside: None,
        given: given.map(PathBuf::from),
        of_session: session.map(PathBuf::from),
        of_users: users.clone(),
        fallback: tmp.clone(),
    };
    for directory in [&session, &users, &tmp] {
        fs::create_dir(directory).unwrap();
    }
    let own = |uid, given, session| place(uid, given, session).own();
    let plain = |uid: u32| tmp.join(format!("cordisk-{uid}"));
    assert_eq!(own(0, None, Some(&session)), [Path::new("/run/cordisk")]);
    assert_eq!(own(0, Some("/x"), None), [Path::new("/x")]);
    assert_eq!(own(1234, None, None), [plain(1234)]);
    assert_eq!(own(me + 1, None, Some(&session)), [plain(me + 1)], "not that of another user");
    assert_eq!(place(1234, None, None).all(), [plain(1234), PathBuf::from("/run/cordisk")]);
    if me == 0 {
        // The user 4242 has a session, the directory of a user that is logged in, and one in /tmp
        // beside one that another user has taken.
        let theirs = |path: PathBuf| {
            fs::create_dir_all(&path).unwrap();
            std::os::unix::fs::chown(&path, Some(4242), None).unwrap();
            path
        };
        let (session, user) = (theirs(session.clone()), theirs(users.join("4242")));
        let second = theirs(tmp.join("cordisk-4242.1"));
        fs::create_dir(plain(4242)).unwrap();
        fs::create_dir(tmp.join("cordisk-4242.2")).unwrap();
        theirs(tmp.join("cordisk-42420"));
        assert_eq!(
            own(4242, None, Some(&session)),
            [session.join("cordisk"), user.join("cordisk"), plain(4242), second]
        );
    }
}

/// Protects: a user that creates `cordisk-UID` in /tmp first cannot keep that user's daemons from
/// having a directory. The next of these daemons finds the same directory.
#[test]
fn a_name_that_somebody_has_taken_is_no_obstacle() {
    let scratch = tempfile::tempdir().unwrap();
    let uid = scratch.path().metadata().unwrap().uid();
    if uid == 0 {
        return eprintln!("skipped: root has a directory of its own");
    }
    let place = Surroundings {
        given: None,
        fallback: scratch.path().into(),
        ..surroundings(scratch.path())
    };
    let taken = scratch.path().join(format!("cordisk-{uid}"));
    // A directory of another user would have the same effect.
    fs::write(&taken, "").unwrap();
    let first = place.make_own().unwrap();
    assert_ne!(first, taken);
    assert_eq!(first.metadata().unwrap().mode() & 0o777, 0o700);
    assert_eq!(place.make_own().unwrap(), first, "and no third one");
    assert!(place.all().contains(&first));
    fs::remove_file(&taken).unwrap();
    assert_eq!(place.make_own().unwrap(), taken);
    assert!(place.all().contains(&first), "what is entered there is still found");
}

/// Protects: the owner of a directory can put any file there; a command that reads it neither
/// blocks nor reads a wrong entry.
#[test]
fn entries_that_make_no_sense_are_left_out() {
    let scratch = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(scratch.path().join(name), text).unwrap();
    let of = |pid: u32| serde_json::to_string(&Entry { pid, ..entry() }).unwrap();
    write("10.json", &of(10));
    write("11.json", &of(12));
    write("13.json", "");
    write("14.json", &of(14)[1..]);
    write("15.json", &of(15).replace("/run/x.sock", "x.sock"));
    write("16.txt", &of(16));
    symlink("10.json", scratch.path().join("17.json")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        scratch.path().join("18.json"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let found = find_in(&surroundings(scratch.path()));
    assert_eq!(found.iter().map(|found| found.entry.pid).collect::<Vec<_>>(), [10]);
    assert!(!found[0].is_running(), "nobody holds it");
    // An empty one belongs to a daemon that starts.
    assert_eq!(super::search::starting_in(&surroundings(scratch.path())), [13]);
}

/// Protects: a link to a directory of another user cannot make an entry look as if that user owned
/// it.
#[test]
fn no_link_leads_to_a_directory_of_entries() {
    let scratch = tempfile::tempdir().unwrap();
    let (real, link) = (scratch.path().join("real"), scratch.path().join("link"));
    let registration = Registration::begin_in(&surroundings(&real), std::process::id()).unwrap();
    registration.publish(&entry()).unwrap();
    symlink(&real, &link).unwrap();
    assert_eq!(find_in(&surroundings(&real)).len(), 1);
    assert_eq!(find_in(&surroundings(&link)).len(), 0);
}

/// Protects: entries that the caller does not need do not use up its descriptors.
#[test]
fn entries_are_open_one_after_the_other() {
    let scratch = tempfile::tempdir().unwrap();
    for pid in 1..=300 {
        let text = serde_json::to_vec(&Entry { pid, ..entry() }).unwrap();
        fs::write(scratch.path().join(format!("{pid}.json")), text).unwrap();
    }
    let place = surroundings(scratch.path());
    let open = || {
        fs::read_dir("/proc/self/fd").unwrap().filter(|fd| {
            let path = fd.as_ref().ok().and_then(|fd| fs::read_link(fd.path()).ok());
            path.is_some_and(|path| path.starts_with(scratch.path()))
        })
    };
    let (mut count, mut most) = (0, 0);
    for found in super::search::find_in(&place) {
        count += 1;
        most = most.max(open().count());
        drop(found);
    }
    assert_eq!(count, 300);
    assert!(most <= 2, "{most} open at a time");
}
