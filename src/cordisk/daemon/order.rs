//! The order of the streams of a mounted disk, and what an order of this disk belongs to.
//!
//! ```text
//! before the sandbox   the file of --order, or BASE.order, is read;
//!                      the child that searches file systems is started (--order auto)
//! in the sandbox       thread "order": BASE.order of a remote base; if there is an order, the head
//!                      of the base and the check of the one against the other, otherwise the
//!                      search; Streams::set_order
//! ```
//! The order is a hint. Only a file that the user has named, and that cannot be read, ends a mount.
//! What belongs to another disk is logged and left out.
//!
//! **Touches:** the file of the order; the base, to check an order, to search its files, to store a
//! learned order, when a client asks, and before its first detach. **Never:** delays the mount for
//! a server.
//! **Invariants:** an order of another disk is not followed; the thread holds the base only while
//! it reads it, so that a stream can detach it.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

use crate::cli::{MountConfig, OrderSource};
use crate::client::BootSearch;
use crate::keeper::{Keeper, LONGEST_LEARNED};
use crate::sandbox::Identity;
use bootset::BootSetLimits;
use control::facts::OrderBase;
use engine::disk::{Base, Disk, FirstTouch};
use engine::stream::{StreamOrder, Streams};
use host::error::Context;
use host::storage::{MemoryFile, Rights, SharedBytes as _};
use host::{Error, ErrorKind, Result};
use order::{BaseIdentity, LONGEST_FILE, Order, SUFFIX, Touch};
use remote::Sources;
use remote::pin::{Pin, Validator};
use remote::url::SourceUrl;

/// How long the stream of a mount waits for the order. A stream that has begun without it follows
/// it as soon as it is there.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// The time after the mount that an order of `--learn` covers, in milliseconds: what is read later
/// is not part of the start.
const LEARNED_MS: u32 = 5 * 60 * 1000;

/// How long the end of a disk waits for the server that takes its order.
const LONGEST_WRITE: Duration = Duration::from_secs(10);

/// How long the file systems of a base are searched.
const LONGEST_SEARCH: Duration = Duration::from_secs(10);

/// Where the order of a disk is.
#[derive(Debug)]
enum Place {
    /// There is none.
    Nowhere,
    /// It was read: its name and its bytes.
    Read(String, Vec<u8>),
    /// It may be on a server. Whether the user has named it.
    Remote(SourceUrl, bool),
}

/// The order of a disk, as far as it is known before the sandbox.
pub(super) struct OrderPlan {
    place: Place,
    is_ascending: bool,
    /// Searches the file systems of the base, if there is no order.
    search: Option<BootSearch>,
    /// Stores the order that the disk leaves.
    learned: Option<StoreOrder>,
    sources: Arc<Sources>,
}

impl OrderPlan {
    /// Reads the file of the order, unless it is on a server.
    ///
    /// # Errors
    /// The file that the user has named cannot be read, or is no order; the rights of the owner of
    /// the image are not known; with `--learn`, no file can lie beside the base, or the keeper
    /// refuses its name.
    pub(super) fn new(
        config: &MountConfig,
        disk: &Disk,
        sources: Arc<Sources>,
        user: Option<Identity>,
        keeper: &Keeper,
    ) -> Result<OrderPlan> {
        // The image names the base, and so the order: its owner must be allowed to read that.
        let owner = rights_of_owner(disk, user)?;
        let is_ascending = config.order == OrderSource::Ascending;
        let place = match &config.order {
            OrderSource::Ascending | OrderSource::Nothing => Place::Nowhere,
            OrderSource::File(path) => {
                let bytes = read_file(path)?;
                let name = path.display().to_string();
                Order::decode(&bytes).map_err(|error| {
                    Error::new(
                        error.kind(),
                        format!("--order {name}: {error}: name a file that cordisk order has made"),
                    )
                })?;
                Place::Read(name, bytes)
            }
            OrderSource::Url(url) => Place::Remote(url.clone(), true),
            OrderSource::BesideBase | OrderSource::FromFiles => beside(disk, owner.as_ref()),
        };
        let is_searched = config.order == OrderSource::FromFiles
            && disk.base().is_some()
            && !matches!(place, Place::Read(..));
        let search = is_searched
            .then(|| BootSearch::start(user.map(|user| (user.uid, user.gid))))
            .transpose()
            .unwrap_or_else(|error| {
                log::warn!("the file systems of the base are not searched: {error}");
                None
            });
        let learned = match config.learn {
            true => store_beside(disk, keeper, &sources, owner.as_ref())?,
            false => None,
        };
        Ok(OrderPlan { place, is_ascending, search, learned, sources })
    }
}

/// The rights with which the first backing file is opened ([`Rights::below`]).
fn rights_of_owner(disk: &Disk, user: Option<Identity>) -> Result<Option<Rights>> {
    let current = user.map(|user| Rights::of(user.uid, user.gid)).transpose()?;
    let image = disk.descriptor()?;
    let stat = rustix::fs::fstat(&image).map_err(std::io::Error::from);
    Rights::below(current, stat.context(|| "the image")?.st_uid)
}

/// Returns the function that stores the order of the disk beside the base: the keeper does, or the
/// fetcher. `None` without a base.
fn store_beside(
    disk: &Disk,
    keeper: &Keeper,
    sources: &Arc<Sources>,
    owner: Option<&Rights>,
) -> Result<Option<StoreOrder>> {
    let Some((name, path)) = disk.base().map(|base| base.name()) else { return Ok(None) };
    let Some(path) = path else { return store_on_server(&name, sources).map(Some) };
    let user = owner.map(Rights::user_and_group);
    Ok(Some(Box::new(keeper.entrust_order(&with_suffix(path), user)?)))
}

/// Returns the function that has the fetcher store the order of the disk beside the remote base
/// `name`.
///
/// # Errors
/// The server can have no file beside the base; there is no memory.
fn store_on_server(name: &str, sources: &Arc<Sources>) -> Result<StoreOrder> {
    let url = SourceUrl::parse(name)?;
    let nowhere = |why: &str| {
        let advice = "save the order with cordisk order save, and name it with --order";
        Error::new(ErrorKind::InvalidArgument, format!("--learn: {url}: {why}: {advice}"))
    };
    if url.is_nbd() {
        return Err(nowhere("an NBD server has no files beside the base"));
    }
    if url.url().query().is_some() {
        return Err(nowhere("a name with a query (?) is not the beginning of other names"));
    }
    let (memory, sources) = (MemoryFile::new(LONGEST_LEARNED)?, Arc::clone(sources));
    Ok(Box::new(move |bytes: &[u8]| {
        memory.write_at(0, bytes).context(|| "--learn")?;
        let descriptor = memory.as_fd().try_clone_to_owned().context(|| "--learn")?;
        sources.write_order(&url, descriptor, bytes.len() as u64, LONGEST_WRITE)
    }))
}

fn with_suffix(path: PathBuf) -> PathBuf {
    let mut beside = path.into_os_string();
    beside.push(SUFFIX);
    beside.into()
}

/// Where the order is that lies beside the base.
fn beside(disk: &Disk, owner: Option<&Rights>) -> Place {
    let Some((name, path)) = disk.base().map(|base| base.name()) else { return Place::Nowhere };
    if let Some(path) = path {
        let beside = with_suffix(path);
        return match Rights::run_with(owner, || read_file(&beside)) {
            Ok(bytes) => Place::Read(beside.display().to_string(), bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => Place::Nowhere,
            Err(error) => {
                log::warn!("the order beside the base is not used: {error}");
                Place::Nowhere
            }
        };
    }
    match SourceUrl::parse(&name)
        .and_then(|url| Ok((url.url().query().is_some(), url.beside(SUFFIX)?)))
    {
        // The signature of a presigned name is for that name only; NBD has no directories.
        Ok((false, url)) if !url.is_nbd() => Place::Remote(url, false),
        _ => Place::Nowhere,
    }
}

/// Reads a file of at most [`LONGEST_FILE`] bytes.
fn read_file(path: &Path) -> Result<Vec<u8>> {
    let what = || path.display().to_string();
    // Opening a device can have an effect, and a named pipe waits for its writer.
    if !std::fs::metadata(path).context(what)?.is_file() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{}: an order is a regular file: make one with cordisk order save", what()),
        ));
    }
    // The name may lead elsewhere by now.
    let mut options = File::options();
    options.read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let file = options.open(path).context(what)?;
    let mut bytes = Vec::new();
    file.take(LONGEST_FILE + 1).read_to_end(&mut bytes).context(what)?;
    Ok(bytes)
}

/// What an order of the disk belongs to: the base that the disk was mounted with. Its head is
/// read when the identity is first needed, at the latest before the chain is detached.
struct KnownBase {
    disk: Weak<Disk>,
    identity: OnceLock<BaseIdentity>,
}

impl KnownBase {
    /// Of a disk whose chain may be detached later.
    fn of(disk: &Arc<Disk>) -> Arc<KnownBase> {
        let known = Arc::new(KnownBase { disk: Arc::downgrade(disk), identity: OnceLock::new() });
        let weak = Arc::downgrade(&known);
        disk.look_before_detach(move |base| {
            if let Some(known) = weak.upgrade() {
                known.look(base);
            }
        });
        known
    }

    /// Returns the identity. `None` if there is no base, or if it cannot be read.
    fn get(&self) -> Option<&BaseIdentity> {
        if self.identity.get().is_none() {
            let base = self.disk.upgrade().and_then(|disk| disk.base())?;
            self.look(&base);
        }
        self.identity.get()
    }

    fn look(&self, base: &Base) {
        if self.identity.get().is_some() {
            return;
        }
        let pin = base.pin().as_ref().and_then(pin_text);
        match BaseIdentity::of(base.size(), |head| base.read(0, head), pin) {
            // Another thread may have been faster.
            Ok(identity) => drop(self.identity.set(identity)),
            Err(error) => log::debug!("what an order belongs to is not known: {error}"),
        }
    }
}

/// What is known of the order of a mounted disk.
pub(super) struct DiskOrder {
    base: Arc<KnownBase>,
    /// The order that was followed, if it belongs to the base.
    followed: Arc<OnceLock<Order>>,
    loaded: Receiver<()>,
    learned: Option<StoreOrder>,
}

/// Stores the bytes of an order beside the base.
type StoreOrder = Box<dyn Fn(&[u8]) -> Result<()> + Send + Sync>;

impl DiskOrder {
    /// Starts the thread that finds the order. If it cannot be started, streams follow the guest
    /// alone.
    pub(super) fn start(
        mut plan: Option<OrderPlan>,
        disk: &Arc<Disk>,
        streams: &Streams,
    ) -> DiskOrder {
        if plan.as_ref().is_some_and(|plan| plan.is_ascending) {
            streams.set_order(StreamOrder::Ascending);
        }
        let (base, followed) = (KnownBase::of(disk), Arc::new(OnceLock::new()));
        let learned = plan.as_mut().and_then(|plan| plan.learned.take());
        let (sender, loaded) = bounded::<()>(0);
        let loader = Loader {
            disk: Arc::downgrade(disk),
            streams: streams.clone(),
            base: Arc::clone(&base),
            followed: Arc::clone(&followed),
        };
        let load = move || {
            // The guest is not to wait for this.
            host::background::mark_thread();
            loader.load(plan);
            drop(sender);
        };
        if let Err(error) = std::thread::Builder::new().name("order".into()).spawn(load) {
            log::warn!("starting a thread: {error}; streams have no order");
        }
        DiskOrder { base, followed, loaded, learned }
    }

    /// Waits until the order is known, but not for long.
    pub(super) fn wait(&self) {
        // The channel has no messages: it is closed when the thread ends.
        let _ = self.loaded.recv_timeout(LONGEST_WAIT);
    }

    /// Leaves the order of the guest beside the base, with `--learn`. A record that is not whole is
    /// not left: it would say that its guest has not needed what it has read before. Failures are
    /// logged as warnings.
    pub(super) fn learn(&self, disk: &Disk) {
        let Some(store) = &self.learned else { return };
        let record = disk.first_touches(0, usize::MAX);
        let last_ms = record.touches.last().map_or(0, |touch| touch.at_ms);
        let touches = record.touches.into_iter().filter(|touch| touch.at_ms < LEARNED_MS);
        let touches: Vec<Touch> =
            touches.map(|FirstTouch { offset, len, at_ms }| Touch { offset, len, at_ms }).collect();
        // What is missing at the end of a record that was cut is not part of the start.
        let is_cut = record.is_cut && last_ms < LEARNED_MS;
        if touches.is_empty() || !record.is_whole || is_cut {
            return log::info!(
                "no order is left beside the base: the guest's reads are not all known, or there were none"
            );
        }
        let Some(base) = self.base.get() else {
            return log::warn!("no order is left beside the base, which cannot be read");
        };
        let mut orders = vec![Order::from_touches(base.clone(), touches)];
        orders.extend(self.followed.get().cloned());
        let merged = Order::merge(&orders);
        match merged.and_then(|order| store(&order.encode_at_most(LONGEST_LEARNED))) {
            Ok(()) => log::info!("the order of the guest was left beside the base"),
            Err(error) => log::warn!("no order is left beside the base: {error}"),
        }
    }

    /// A function that returns what an order of this disk belongs to. It may read the base.
    pub(super) fn base_source(&self) -> Arc<dyn Fn() -> Option<OrderBase> + Send + Sync> {
        let base = Arc::clone(&self.base);
        Arc::new(move || {
            let identity = base.get()?;
            let (size, head) = (identity.size, identity.head_text());
            Some(OrderBase { size, head, pin: identity.pin.clone() })
        })
    }
}

/// What the thread works with.
struct Loader {
    disk: Weak<Disk>,
    streams: Streams,
    base: Arc<KnownBase>,
    followed: Arc<OnceLock<Order>>,
}

impl Loader {
    fn load(&self, plan: Option<OrderPlan>) {
        let Some(OrderPlan { place, sources, search, .. }) = plan else { return };
        let (name, bytes) = match place {
            Place::Nowhere => return self.search(search),
            Place::Read(name, bytes) => (name, Ok(bytes)),
            Place::Remote(url, is_given) => match sources.read_beside(&url, LONGEST_FILE) {
                Err(error) if !is_given => {
                    log::debug!("there is no order beside the base: {error}");
                    return self.search(search);
                }
                bytes => (url.to_string(), bytes),
            },
        };
        let Some(identity) = self.base.get() else {
            return log::warn!("the order {name} is not used: the base cannot be read");
        };
        let order = bytes.and_then(|bytes| Order::decode(&bytes)).and_then(|order| {
            order.check_base(identity)?;
            Ok(order)
        });
        match order {
            Ok(order) => {
                let wanted = order.wanted();
                log::info!(
                    "streams follow the order {name}: {} ranges, {} bytes",
                    wanted.len(),
                    order.bytes()
                );
                self.streams.set_order(StreamOrder::Guest(wanted.into()));
                let _ = self.followed.set(order);
            }
            Err(error) => log::warn!("the order {name} is not used: {error}"),
        }
    }
}

impl Loader {
    /// Finds what a boot needs from the file systems of the base.
    fn search(&self, search: Option<BootSearch>) {
        let Some(search) = search else { return };
        let Some(base) = self.disk.upgrade().and_then(|disk| disk.base()) else { return };
        let size = base.size();
        drop(base);
        let until = Instant::now().checked_add(LONGEST_SEARCH);
        let limits = BootSetLimits { until, ..BootSetLimits::default() };
        let read = |offset: u64, buf: &mut [u8]| {
            // The chain is not held between two reads, so that a stream can detach it.
            let base = self.disk.upgrade().and_then(|disk| disk.base());
            let gone = || Error::new(ErrorKind::NotFound, "the backing chain is detached");
            base.ok_or_else(gone)?.read(offset, buf)
        };
        match search.run(size, read, &limits) {
            Ok(found) => {
                found.notes.iter().for_each(|note| log::debug!("the files of the base: {note}"));
                let bytes: u64 = found.ranges.iter().map(|range| range.end - range.start).sum();
                log::info!(
                    "streams follow the files of the base: {} ranges, {bytes} bytes",
                    found.ranges.len()
                );
                self.streams.set_order(StreamOrder::Guest(found.ranges.into()));
            }
            Err(error) => log::warn!("the files of the base are not followed: {error}"),
        }
    }
}

/// A pin as an order has it.
fn pin_text(pin: &Pin) -> Option<String> {
    match (&pin.digest, &pin.validator) {
        (Some(digest), _) => Some(format!("sha256:{digest}")),
        (None, Validator::Etag(value)) => Some(format!("etag {value}")),
        (None, Validator::Version(value)) => Some(format!("version {value}")),
        (None, Validator::Generation(value)) => Some(format!("generation {value}")),
        (None, Validator::None) => None,
    }
}
