use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use log::Log as _;

use super::*;

fn say(log: &Log, level: Level, target: &str, text: &str) {
    log.log(&Record::builder().level(level).target(target).args(format_args!("{text}")).build());
}

fn to_file(path: &Path) -> Log {
    let file = open_file(path, &Owners::default()).unwrap();
    Log::new(
        None,
        Some(Outlet::new(
            path.display().to_string(),
            "/srv/vm.raw".into(),
            Sink::File(file.into()),
        )),
    )
}

/// For a log without a daemon, or with one that is not restarted.
fn no_daemon(daemon: Daemon) -> Result<UnixDatagram> {
    panic!("connects to {daemon:?}")
}

/// Protects: with and without its thread, the file gets every line once, in order, and each line
/// names its disk.
#[test]
fn a_file_has_all_lines_in_order() {
    for thread in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "what was there stays\n").unwrap();
        let log = to_file(&path);
        if thread {
            log.start_thread(no_daemon);
        }
        for number in 0..200 {
            say(&log, Level::Info, "cordisk::daemon", &format!("line {number}\nand no other"));
        }
        say(&log, Level::Debug, "cordisk::daemon", "not asked for");
        say(&log, Level::Error, "fuser::channel", "another's");
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 201, "{text}");
        assert_eq!(lines[0], "what was there stays");
        for (number, line) in lines[1..].iter().enumerate() {
            let end = format!("Z INFO  cordisk::daemon] /srv/vm.raw: line {number}\\nand no other");
            assert!(line.starts_with('[') && line.ends_with(&end), "{line}");
        }
    }
}

/// Protects: after a rotation, the next line goes to the new file.
#[test]
fn a_file_can_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (path, old) = (dir.path().join("log"), dir.path().join("log.1"));
    let log = to_file(&path);
    log.start_thread(no_daemon);
    say(&log, Level::Warn, "cordisk::a", "first");
    log.flush();
    std::fs::rename(&path, &old).unwrap();
    log.replace_file(open_file(&path, &Owners::default()).unwrap());
    say(&log, Level::Warn, "cordisk::a", "second");
    log.flush();
    assert!(std::fs::read_to_string(&old).unwrap().contains("first"));
    let new = std::fs::read_to_string(&path).unwrap();
    assert!(new.contains("second") && !new.contains("first"), "{new}");
}

/// Protects: `status` shows the newest warning of this program, whether or not lines are written.
#[test]
fn the_last_warning_is_kept() {
    let log = Log::new(None, None);
    assert_eq!(log.last_warning(), None);
    say(&log, Level::Warn, "cordisk::disk", "first");
    say(&log, Level::Error, "cordisk::disk", "sec\nond");
    say(&log, Level::Info, "cordisk::disk", "news");
    say(&log, Level::Error, export::GUEST, "read at 0+4096: gone");
    say(&log, Level::Error, "fuser", "another's");
    let last = log.last_warning().unwrap();
    assert_eq!((last.level, last.message.as_str()), (Level::Error, "sec\\nond"));
}

/// Protects: a log daemon that does not read delays no thread, and the lines that it missed are
/// counted.
#[test]
fn a_stopped_log_daemon_delays_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let daemon = UnixDatagram::bind(&path).unwrap();
    let system = SystemLog::connect_at(&path, &path, &[]).unwrap();
    let log =
        Log::new(None, Some(Outlet::new("journal".into(), String::new(), Sink::System(system))));
    log.start_thread(no_daemon);
    // More lines than a socket and the queue hold. The test is that this loop ends.
    let most = 40 * QUEUE;
    for number in 0..most {
        say(&log, Level::Info, "cordisk::a", &format!("line {number}"));
    }
    let outlet = log.shared.outlet.as_ref().unwrap();
    assert!(outlet.lost.load(Ordering::Relaxed) > 0);
    // The daemon continues to read: it gets the queued lines, then the number of lost ones.
    daemon.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut buf = [0; 4096];
    let mut read = move || {
        let len = daemon.recv(&mut buf).unwrap();
        String::from_utf8_lossy(&buf[..len]).into_owned()
    };
    // The first line may follow a count, because the queue may be full before the thread starts.
    assert!(read().contains("MESSAGE=line 0\n") || read().contains("MESSAGE=line 0\n"));
    while !read().contains("lines of the log were lost") {}
}

/// Protects: a log daemon that was restarted gets every later line, after the number of lines that
/// it missed. No thread waits for a line while the daemon is away.
#[test]
fn a_log_daemon_that_was_restarted_gets_the_next_line() {
    for of_journal in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (path, none) = (dir.path().join("socket"), dir.path().join("none"));
        let listen = || {
            let daemon = UnixDatagram::bind(&path).unwrap();
            daemon.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            daemon
        };
        let read = |daemon: &UnixDatagram| {
            let mut buf = [0; 4096];
            let len = daemon.recv(&mut buf).unwrap();
            String::from_utf8_lossy(&buf[..len]).trim_end().to_owned()
        };
        let first = listen();
        let (journal, syslog, want) = if of_journal {
            (&path, &none, Daemon::Journal)
        } else {
            (&none, &path, Daemon::Syslog)
        };
        let system = SystemLog::connect_at(journal, syslog, &[]).unwrap();
        let log = Log::new(
            None,
            Some(Outlet::new(system.name().into(), String::new(), Sink::System(system))),
        );
        let (there, asked) = (path.clone(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&asked);
        log.start_thread(move |daemon| {
            assert_eq!(daemon, want);
            count.fetch_add(1, Ordering::Relaxed);
            system::connect(&there).context(|| "restarted")
        });
        let tell = |text: &str| {
            say(&log, Level::Info, "cordisk::a", text);
            log.flush();
        };
        tell("before");
        assert!(read(&first).ends_with("before"));
        // Closed first with the file of the socket still there, then without it.
        drop(first);
        tell("lost");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        std::fs::remove_file(&path).unwrap();
        tell("lost as well");
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        let second = listen();
        tell("after");
        assert!(read(&second).ends_with("2 lines of the log were lost"));
        assert!(read(&second).ends_with("after"));
        tell("and on");
        assert!(read(&second).ends_with("and on"));
        assert_eq!(asked.load(Ordering::Relaxed), 3, "one connection for all lines");
        // Restarted before the next line, so no line is lost.
        drop(second);
        std::fs::remove_file(&path).unwrap();
        let third = listen();
        tell("again");
        assert!(read(&third).ends_with("again"));
    }
}

#[test]
fn journal_and_syslog_are_spoken_to_in_their_own_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, syslog) = (dir.path().join("journal"), dir.path().join("syslog"));
    let fields = [("CORDISK_IMAGE", "/srv/a\nb.qcow2".to_owned())];
    assert!(SystemLog::connect_at(&journal, &syslog, &fields).is_none());
    let receive = |from: &UnixDatagram| {
        let mut buf = [0; 4096];
        let len = from.recv(&mut buf).unwrap();
        String::from_utf8(buf[..len].to_vec()).unwrap()
    };
    let line = LogLine::new(Level::Warn, "cordisk::disk", "it stops\nnow");
    let pid = std::process::id();

    let listens = UnixDatagram::bind(&syslog).unwrap();
    let log = SystemLog::connect_at(&journal, &syslog, &fields).unwrap();
    assert_eq!(log.name(), "syslog");
    log.send("/srv/vm.raw", &line).unwrap();
    let text = receive(&listens);
    let end = format!(" cordisk[{pid}]: /srv/vm.raw: it stops\\nnow");
    // 28 is daemon.warning; "Nov 29 00:30:05" has 15 characters.
    assert!(
        text.starts_with("<28>") && text.ends_with(&end) && text.len() == 4 + 15 + end.len(),
        "{text}"
    );

    let listens = UnixDatagram::bind(&journal).unwrap();
    let log = SystemLog::connect_at(&journal, &syslog, &fields).unwrap();
    assert_eq!(log.name(), "journal");
    log.send("", &line).unwrap();
    let want = format!(
        "PRIORITY=4\nSYSLOG_IDENTIFIER=cordisk\nSYSLOG_PID={pid}\nSYSLOG_FACILITY=3\nCORDISK_IMAGE=/srv/a\\nb.qcow2\nTARGET=cordisk::disk\n\
         MESSAGE=it stops\\nnow\n"
    );
    assert_eq!(receive(&listens), want);
    // The longest line of a message still fits a datagram. A larger one would need system calls
    // that kill a process in the sandbox.
    let longest = LogLine::new(Level::Error, "cordisk::disk", &"\u{2028}".repeat(20_000));
    log.send("/srv/vm.raw", &longest).unwrap();
}

#[test]
fn a_log_file_is_ours_and_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let refused = |path: &Path| open_file(path, &Owners::default()).unwrap_err().to_string();
    open_file(&path("new"), &Owners::default()).unwrap();
    assert_eq!(path("new").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    symlink(path("new"), path("link")).unwrap();
    assert!(refused(&path("link")).contains("symbolic link"));
    assert!(refused(dir.path()).contains("directory"), "{}", refused(dir.path()));
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(refused(&path("pipe")).contains("not a regular file"));
    assert!(refused(Path::new("/dev/null")).contains("not a regular file"));
    assert!(refused(&path("none/log")).contains("No such file"));
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path("new"), Some(65534), None).unwrap();
        assert!(refused(&path("new")).contains("another user"));
        assert_eq!(
            open_file(&path("new"), &Owners(vec![65534])).unwrap().metadata().unwrap().uid(),
            65534
        );
    }
}
