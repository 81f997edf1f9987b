//! `cordisk top`: the disks that run, live.
//!
//! One thread looks at each disk and reports ([`watch`]); this one takes reports and keys into the [`model`] and draws it ([`screen`]). The terminal
//! is put back on every way out: return, panic, signal. Signals and a terminal that goes away have
//! a thread of their own (`ending.rs`).
//!
//! **Touches:** the terminal, sessions with daemons. **Never:** waits for a daemon on the thread that draws. **Locks:** none; threads report over one
//! channel.

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
use crate::Result;
use crate::error::Context;
use ending::Ending;
use model::{DiskView, Model};
use watch::{Order, Report, Wanted};

/// How long a key or a report may wait at most until it is seen.
const TICK: Duration = Duration::from_millis(50);

/// `cordisk top`.
#[derive(Clone, Debug)]
pub struct TopOptions {
    /// The disk; all that run where none is given.
    pub target: Option<PathBuf>,
    /// Time between two looks.
    pub interval: Duration,
    /// One snapshot, for programs.
    pub json: bool,
}

/// Shows the disks until the user has seen enough; where standard output is no terminal, prints what went on during one interval.
///
/// # Errors
/// There is no such disk, or it cannot be talked to; the terminal fails.
pub fn run(options: &TopOptions) -> Result<ExitCode> {
    let names = match &options.target {
        Some(target) => {
            // An error is better told before the screen has changed.
            drop(watch::connect(target)?);
            vec![target.clone()]
        }
        None => watch::running()?,
    };
    if std::io::stdout().is_terminal() && !options.json { live(options, names) } else { once(options, names) }
}

/// Two looks at each disk, and what was between them.
fn once(options: &TopOptions, names: Vec<PathBuf>) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let standard_output = || "standard output";
    if names.is_empty() && !options.json {
        writeln!(out, "no disk is running here").context(standard_output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut disks: Vec<(DiskView, PathBuf)> = names.into_iter().map(|name| (DiskView::new(name.display().to_string()), name)).collect();
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
        writeln!(out, "{:#}", json::snapshot(disks.iter().map(|(disk, _)| disk))).context(standard_output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let text: Vec<String> = disks.iter().map(|(disk, _)| plain::snapshot(disk)).collect();
    out.write_all(text.join("\n").as_bytes()).context(standard_output)?;
    Ok(ExitCode::SUCCESS)
}

fn live(options: &TopOptions, names: Vec<PathBuf>) -> Result<ExitCode> {
    // The keyboard's Ctrl-C comes as a key.
    let ending = Ending::watch()?;
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
    // Drawn once before anybody is asked, so that the first map fits already.
    let ended = screen
        .terminal
        .draw(|frame| top.draw(frame))
        .map(drop)
        .context(|| "the terminal")
        .and_then(|()| top.add(names))
        .and_then(|()| top.run(&mut screen.terminal, &reports, &ending));
    drop(screen);
    ended?;
    // As a shell tells of a program that a signal has ended.
    let status = ending.signal().map_or(0, |number| u8::try_from(128 + number).unwrap_or(1));
    Ok(ExitCode::from(status))
}

/// The terminal while it is ours. Dropping it puts it back; so does a panic (the hook that ratatui sets).
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
        // Where this fails there is no terminal any more.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// Everything that belongs to a screen.
struct Top {
    model: Model,
    /// Of the disks, as they were found.
    names: Vec<PathBuf>,
    orders: Vec<Sender<Order>>,
    wanted: Arc<Wanted>,
    interval: Duration,
    /// The terminal shows more than ASCII.
    unicode: bool,
    sender: Sender<Report>,
}

impl Top {
    /// Begins to watch those that are not watched yet. Those that go away stay on the screen, and are seen again when they come back.
    fn add(&mut self, names: Vec<PathBuf>) -> Result<()> {
        for name in names {
            if self.names.contains(&name) {
                continue;
            }
            let index = self.names.len();
            self.orders.push(watch::watch(index, name.clone(), self.interval, Arc::clone(&self.wanted), self.sender.clone())?);
            self.model.disks.push(DiskView::new(name.display().to_string()));
            self.names.push(name);
        }
        Ok(())
    }

    fn run(&mut self, terminal: &mut DefaultTerminal, reports: &Receiver<Report>, ending: &Ending) -> Result<()> {
        let failed = || "the terminal";
        let mut changed = true;
        while ending.signal().is_none() {
            if changed {
                terminal.draw(|frame| self.draw(frame)).context(failed)?;
            }
            changed = self.model.forget_old_message();
            // A signal interrupts the wait, which is no error.
            let mut wait = TICK;
            while event::poll(wait).or_else(interrupted).context(failed)? {
                changed = true;
                wait = Duration::ZERO;
                match event::read().context(failed)? {
                    Event::Key(key) if key.kind != KeyEventKind::Release && self.quits(key) => return Ok(()),
                    _ => {}
                }
            }
            for report in reports.try_iter().collect::<Vec<_>>() {
                changed = true;
                match report {
                    Report::Seen(index, seen) => {
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
        frame.render_widget(Text::from(if self.unicode { lines } else { screen::in_ascii(lines) }), area);
    }

    /// Acts on a key; says whether it is the last one.
    fn quits(&mut self, key: KeyEvent) -> bool {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Up | KeyCode::Char('k') => self.choose(false),
            KeyCode::Down | KeyCode::Char('j') => self.choose(true),
            KeyCode::Char('p') => self.order(Order::Toggle),
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
        self.order(Order::Look);
    }

    /// Gives an order for the chosen disk. One that hangs has orders enough.
    fn order(&self, order: Order) {
        if let Some(orders) = self.orders.get(self.model.selected) {
            let _ = orders.try_send(order);
        }
    }
}

fn interrupted(error: std::io::Error) -> std::io::Result<bool> {
    if error.kind() == std::io::ErrorKind::Interrupted { Ok(false) } else { Err(error) }
}
