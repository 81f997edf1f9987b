//! The note of what the backing files were like, kept beside the overlay's bytes (P10).

use std::path::Path;

use crate::chain::Chain;
use crate::storage::Storage;

/// P10: what was copied up and what is still read from below must be of one piece. The first mount notes what the backing files are like; a later one
/// warns if they have changed. (Fewer of them, after a stream to a base, is no change of those that are left.)
pub(super) fn warn_of_changed_base(path: &Path, storage: &dyn Storage, chain: &Chain) -> std::io::Result<()> {
    let now = chain.versions();
    match storage.base_note()? {
        None => storage.set_base_note(&now),
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
