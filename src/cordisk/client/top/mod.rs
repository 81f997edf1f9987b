//! `cordisk top`: a live view of the running disks.
//!
//! One thread queries each disk and reports ([`watch`]). The main thread puts reports and keys into
//! the [`model`] and draws it ([`screen`]). The terminal is restored on every exit: return, panic,
//! signal. A thread of its own handles signals and the loss of the terminal (`ending.rs`).
//!
//! **Touches:** the terminal, sessions with daemons. **Never:** waits for a daemon on the thread
//! that draws. **Locks:** none; threads report over one channel.

mod bars;
mod ending;
mod json;
mod model;
mod plain;
mod rates;
mod screen;
mod watch;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::text::Text;

use super::show;
use ending::TopEnding;
use host::error::Context;
use host::{Error, Result};
use model::{DiskView, Model};
use watch::{Report, WatchOrder, WatchRequest};

/// The longest time until a key or a report is handled.
const TICK: Duration = Duration::from_millis(50);

/// The options of `cordisk top`.
#[derive(Clone, Debug)]
pub struct TopOptions {
    /// The disk; all running disks if `None`.
    pub target: Option<PathBuf>,
    /// Time between two queries.
    pub interval: Duration,
    /// Print one snapshot as JSON.
    pub json: bool,
}

/// Shows the disks until the user quits. If standard output is not a terminal, prints the activity
/// during one interval.
///
/// # Errors
/// There is no such disk, it cannot be reached, or the terminal fails.
pub fn run(options: &TopOptions) -> Result<ExitCode> {
    let names = match &options.target {
        Some(target) => {
            // Connect once now, so that an error is printed before the screen changes.
            drop(watch::connect(target)?);
            vec![target.clone()]
        }
        None => watch::running()?,
    };
    if std::io::stdout().is_terminal() && !options.json {
        live(options, names)
    } else {
        once(options, names)
    }
}

/// Queries each disk twice, and prints the difference.
fn once(options: &TopOptions, names: Vec<PathBuf>) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    if names.is_empty() && !options.json {
        writeln!(out, "no disk is running here").map_err(Error::standard_output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut disks: Vec<(DiskView, PathBuf)> =
        names.into_iter().map(|name| (DiskView::new(name.display().to_string()), name)).collect();
    let mut connections: Vec<_> = disks.iter().map(|(_, name)| watch::connect(name)).collect();
    for looks in 0..2 {
        if looks > 0 {
            std::thread::sleep(options.interval);
        }
        for ((disk, _), connection) in disks.iter_mut().zip(&mut connections) {
            let seen = match connection {
                Ok(connection) => watch::look(connection, None).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            disk.see(seen);
        }
    }
    if options.json {
        writeln!(out, "{:#}", json::snapshot(disks.iter().map(|(disk, _)| disk)))
            .map_err(Error::standard_output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let text: Vec<String> = disks.iter().map(|(disk, _)| plain::snapshot(disk)).collect();
    out.write_all(text.join("\n").as_bytes()).map_err(Error::standard_output)?;
    Ok(ExitCode::SUCCESS)
}

fn live(options: &TopOptions, names: Vec<PathBuf>) -> Result<ExitCode> {
    // In raw mode, Ctrl-C arrives as a key and not as a signal.
    let ending = TopEnding::watch()?;
    let (sender, reports) = unbounded();
    if options.target.is_none() {
        watch::find_disks(options.interval, sender.clone())?;
    }
    let mut top = Top {
        model: Model { interval: options.interval.as_secs_f64(), ..Model::default() },
        names: Vec::new(),
        orders: Vec::new(),
        wanted: Arc::default(),
        interval: options.interval,
        unicode: show::is_unicode(),
        sender,
    };
    let mut screen = Screen::enter()?;
    // Drawn once before any daemon is asked, so that the first map is requested in the right size.
    let ended = screen
        .terminal
        .draw(|frame| top.draw(frame))
        .map(drop)
        .context(|| "the terminal")
        .and_then(|()| top.add(names))
        .and_then(|()| top.run(&mut screen.terminal, &reports, &ending));
    drop(screen);
    ended?;
    // The exit status that a shell reports for a program that a signal has ended.
    let status = ending.signal().map_or(0, |number| u8::try_from(128 + number).unwrap_or(1));
    Ok(ExitCode::from(status))
}

/// The terminal in raw mode. Dropping it restores the terminal; the panic hook that ratatui
/// installs does so too.
struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    fn enter() -> Result<Screen> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Screen { terminal }),
            Err(error) => {
                let _ = ratatui::try_restore();
                Err(error).context(|| "the terminal")
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If this fails, the terminal has gone.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// The state of the live view.
struct Top {
    model: Model,
    /// Names of the disks, in the order in which they were found.
    names: Vec<PathBuf>,
    orders: Vec<Sender<WatchOrder>>,
    wanted: Arc<WatchRequest>,
    interval: Duration,
    /// The terminal can show more than ASCII.
    unicode: bool,
    sender: Sender<Report>,
}

impl Top {
    /// Starts to watch the disks that are not watched yet. A disk that goes away stays on the
    /// screen, and its thread finds it again when it comes back.
    fn add(&mut self, names: Vec<PathBuf>) -> Result<()> {
        for name in names {
            if self.names.contains(&name) {
                continue;
            }
            let index = self.names.len();
            self.orders.push(watch::watch(
                index,
                name.clone(),
                self.interval,
                Arc::clone(&self.wanted),
                self.sender.clone(),
            )?);
            self.model.disks.push(DiskView::new(name.display().to_string()));
            self.names.push(name);
        }
        Ok(())
    }

    fn run(
        &mut self,
        terminal: &mut DefaultTerminal,
        reports: &Receiver<Report>,
        ending: &TopEnding,
    ) -> Result<()> {
        let failed = || "the terminal";
        let mut changed = true;
        while ending.signal().is_none() {
            if changed {
                terminal.draw(|frame| self.draw(frame)).context(failed)?;
            }
            changed = self.model.forget_old_message();
            // A signal interrupts the wait, which is not an error.
            let mut wait = TICK;
            while event::poll(wait).or_else(interrupted).context(failed)? {
                changed = true;
                wait = Duration::ZERO;
                match event::read().context(failed)? {
                    Event::Key(key) if key.kind != KeyEventKind::Release && self.quits(key) => {
                        return Ok(());
                    }
                    _ => {}
                }
            }
            for report in reports.try_iter().collect::<Vec<_>>() {
                changed = true;
                match report {
                    Report::LastSeen(index, seen) => {
                        if let Some(disk) = self.model.disks.get_mut(index) {
                            disk.see(*seen);
                        }
                    }
                    Report::Message(text) => self.model.message = Some((text, Instant::now())),
                    Report::Running(names) => self.add(names)?,
                }
            }
        }
        Ok(())
    }

    fn draw(&self, frame: &mut ratatui::Frame<'_>) {
        let area = frame.area();
        let (width, height) = (usize::from(area.width), usize::from(area.height));
        self.wanted.cells.store(screen::map_places(width, height), Ordering::Relaxed);
        let lines = screen::screen(&self.model, width, height);
        frame.render_widget(
            Text::from(if self.unicode { lines } else { screen::in_ascii(lines) }),
            area,
        );
    }

    /// Handles a key; returns true if the key quits.
    fn quits(&mut self, key: KeyEvent) -> bool {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Up | KeyCode::Char('k') => self.choose(false),
            KeyCode::Down | KeyCode::Char('j') => self.choose(true),
            KeyCode::Char('p') => self.order(WatchOrder::Toggle),
            KeyCode::Char('?' | 'h') => self.model.help = !self.model.help,
            _ => {
                self.model.help = false;
                self.model.message = None;
            }
        }
        false
    }

    fn choose(&mut self, down: bool) {
        self.model.choose(down);
        self.wanted.disk.store(self.model.selected, Ordering::Relaxed);
        self.order(WatchOrder::PictureStyle);
    }

    /// Sends an order for the selected disk. If its queue is full because the disk hangs, the order
    /// is dropped.
    fn order(&self, order: WatchOrder) {
        if let Some(orders) = self.orders.get(self.model.selected) {
            let _ = orders.try_send(order);
        }
    }
}

fn interrupted(error: std::io::Error) -> std::io::Result<bool> {
    if error.kind() == std::io::ErrorKind::Interrupted { Ok(false) } else { Err(error) }
}
