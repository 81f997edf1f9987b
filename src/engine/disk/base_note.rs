//! The record of the versions of the backing files, kept in an extended attribute of the overlay
//! (P10).

use std::path::Path;

use crate::chain::Chain;
use host::storage::Sidecar;

/// Warns if a backing file has changed since the image was first mounted.
///
/// P10: clusters that were copied up must fit those that are still read from below. The first mount
/// records the versions of the backing files; a later mount compares. A shorter chain, as after a
/// stream to a base, is no change of the remaining files.
pub(super) fn warn_of_changed_base(
    path: &Path,
    sidecar: &dyn Sidecar,
    chain: &Chain,
) -> std::io::Result<()> {
    let now = chain.versions();
    match sidecar.base_note()? {
        None => sidecar.set_base_note(&now),
        Some(noted) if noted.ends_with(&now) => Ok(()),
        Some(_) => {
            let path = path.display();
            log::warn!(
                "{path}: a backing file was changed or exchanged since this image was first mounted; what was copied up before may not fit \
                 what is read from below now (if that is as it should be: setfattr -x user.cordisk.base {path})"
            );
            Ok(())
        }
    }
}
