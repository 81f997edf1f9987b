#!/usr/bin/env bash
# Builds the Debian package: target/debian/cordisk_VERSION_ARCH.deb.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/package.sh [--check]

Builds the release program, its manual pages and completions, and puts them into a Debian package
together with the systemd unit and the helper of mount(8). Prints what is in it, and where it is.
Installs cargo-deb into target/tools if it is not there.

  --check     then look at the package: its files, its pages, its unit; as root, where no package
              cordisk is installed, also install it, mount a disk with it, and remove it again
  -h, --help  this text
END
}

check=''
while (($#)); do
    case $1 in
        --check) check=1 ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done
cd "$repo"
have cargo || die "cargo is not in PATH; see https://rustup.rs"
have dpkg-deb || die "dpkg-deb is missing: a Debian package is built on Debian or Ubuntu"

# ---- what goes into it ---------------------------------------------------------------------------

cargo build --locked --release --package cordisk # alone: with the crates for tests it would get their features
program=$repo/target/release/cordisk
staged=$repo/target/package
rm -rf "$staged"
mkdir -p "$staged"/{sbin,completions,doc,documents,examples}

"$program" man "$staged/man"
"$program" completions bash >"$staged/completions/cordisk"
"$program" completions zsh >"$staged/completions/_cordisk"
"$program" completions fish >"$staged/completions/cordisk.fish"
for name in mount.fuse.cordisk mount.cordisk; do ln -s ../bin/cordisk "$staged/sbin/$name"; done
echo '.so man8/mount.fuse.cordisk.8' >"$staged/man/mount.cordisk.8"
for name in README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE; do
    if [[ -e $name ]]; then cp "$name" "$staged/doc/"; fi
done
cp docs/* "$staged/documents/" # where the links of README.md lead
cp contrib/systemd/example.conf contrib/sources.toml "$staged/examples/"
# The Grafana dashboard, wherever below contrib it is.
find contrib -name '*.json' -exec cp {} "$staged/examples/" \;

# ---- the package ---------------------------------------------------------------------------------

cargo_deb=$(command -v cargo-deb || true)
if [[ -z $cargo_deb ]]; then
    cargo_deb=$repo/target/tools/bin/cargo-deb
    # Its own target directory, so that it does not build beside our dependencies.
    [[ -x $cargo_deb ]] || cargo install --locked --quiet --root "$repo/target/tools" --target-dir "$repo/target/tools/build" cargo-deb
    rm -rf "$repo/target/tools/build"
fi
rm -f "$repo"/target/debian/cordisk_*.deb
CARGO=cargo "$cargo_deb" deb --no-build --strip --locked --quiet --output "$repo/target/debian/" >/dev/null
package=$(find "$repo/target/debian" -maxdepth 1 -name 'cordisk_*.deb')
[[ -f $package ]] || die "cargo-deb has made no package"
contents=$(dpkg-deb -c "$package")
printf '%s\n' "$contents" | awk '{ size = $3; $1 = $2 = $3 = $4 = $5 = ""; sub(/^ +/, ""); printf "%10s  %s\n", size, $0 }'
printf '\n%s (%s)\n' "$package" "$(human "$(stat -c %s "$package")")"
[[ -n $check ]] || exit 0

# ---- looked at -----------------------------------------------------------------------------------

root=$(mktemp -d "${TMPDIR:-/tmp}/cordisk-package.XXXXXX")
installed=''
cleanup() {
    if mountpoint_is_busy "$root/vm.raw"; then umount -l "$root/vm.raw" || true; fi
    if [[ -n $installed ]]; then dpkg --purge cordisk >/dev/null || true; fi
    rm -rf --one-file-system "$root"
}
trap cleanup EXIT

for file in usr/bin/cordisk usr/libexec/cordisk/cordisk-fetcher usr/share/man/man1/cordisk.1.gz usr/share/man/man1/cordisk-mount.1.gz usr/share/man/man8/mount.fuse.cordisk.8.gz \
    usr/share/bash-completion/completions/cordisk usr/share/zsh/vendor-completions/_cordisk usr/share/fish/vendor_completions.d/cordisk.fish \
    usr/lib/systemd/system/cordisk@.service etc/cordisk/example.conf etc/cordisk/sources.toml \
    usr/share/doc/cordisk/copyright usr/share/doc/cordisk/examples/example.conf usr/share/doc/cordisk/examples/sources.toml; do
    grep -q " \./$file\$" <<<"$contents" || die "the package has no $file"
done
for name in mount.fuse.cordisk mount.cordisk; do
    grep -q " \./usr/sbin/$name -> \.\./bin/cordisk\$" <<<"$contents" || die "the package has no link usr/sbin/$name"
done
[[ $(dpkg-deb -f "$package" Depends) == *fuse3* ]] || die "the package does not depend on fuse3"

dpkg-deb -x "$package" "$root/x"
[[ $("$root/x/usr/bin/cordisk" --version) == "cordisk $(dpkg-deb -f "$package" Version | sed 's/-[^-]*$//')" ]] || die "the program and the package differ in version"
if have man; then
    for page in "$root"/x/usr/share/man/man*/*.gz; do
        # From the root of the manual: one page is another by a reference from there.
        said=$(cd "$root/x/usr/share/man" && man -l --warnings "$page" 2>&1 >/dev/null) || die "$page does not render"
        [[ -z $said ]] || die "$page: $said"
    done
fi
[[ $("$root/x/usr/libexec/cordisk/cordisk-fetcher" --version) == cordisk-fetcher\ * ]] || die "the fetcher does not run"
if grep -vE '^(#|$)' contrib/sources.toml; then die "contrib/sources.toml changes something: all of it has to be a comment"; fi
bash -n "$root/x/usr/share/bash-completion/completions/cordisk"
if have systemd-analyze; then
    # With the program where it is now.
    sed "s|/usr/bin/cordisk|$root/x/usr/bin/cordisk|; s|/etc/cordisk|$root/x/etc/cordisk|" "$root/x/usr/lib/systemd/system/cordisk@.service" \
        >"$root/cordisk@example.service"
    said=$(systemd-analyze verify --man=no "$root/cordisk@example.service" 2>&1 | grep -F 'cordisk@' || true)
    [[ -z $said ]] || die "systemd-analyze: $said"
fi
echo 'the files are good'

if ((EUID)) || dpkg-query -W cordisk >/dev/null 2>&1 || [[ -e /usr/sbin/mount.fuse.cordisk || ! -e /dev/fuse ]] || ! have qemu-img; then
    echo 'not installed for a test: this needs root, /dev/fuse and qemu-img, and no cordisk on this system'
    exit 0
fi
installed=1
dpkg -i "$package" >/dev/null
[[ $(/usr/bin/cordisk --version) == cordisk\ * ]] || die 'the installed program does not run'
man -w mount.fuse.cordisk >/dev/null || ! have man || die 'man does not find the page'
head -c 1M /dev/urandom >"$root/base.raw"
/usr/bin/cordisk create "$root/vm.qcow2" -b "$root/base.raw" -F raw
touch "$root/vm.raw"
mount -t fuse.cordisk -o stream,speed=50M "$root/vm.qcow2" "$root/vm.raw"
cmp "$root/vm.raw" "$root/base.raw" || die 'the disk is not what its base is'
umount "$root/vm.raw"
# The fetcher is found, and its configuration is one: a server that is not there is the only error.
said=$(/usr/bin/cordisk create "$root/far.qcow2" -b nbd+unix:///?socket=/nonexistent -F raw --source-timeout 1 --cache "$root/cache" 2>&1 || true)
[[ $said == *nbd+unix* && $said != *'not installed'* && $said != *sources.toml* ]] || die "a remote base: $said"
dpkg -r cordisk >/dev/null
[[ ! -e /usr/bin/cordisk && ! -e /usr/sbin/mount.fuse.cordisk && -e /etc/cordisk/example.conf ]] || die 'removal has left something, or has taken the configuration'
dpkg --purge cordisk >/dev/null
[[ ! -e /etc/cordisk ]] || die 'the purge has left /etc/cordisk'
installed=''
echo 'installed, mounted with mount(8), and removed'
