# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Debian packages without installing them: a private apt that downloads into the cache, and `dpkg -x`.
#
# Why private: QEMU 10.0 lives in bookworm-backports, 7.2 in bookworm; they cannot be installed side by side, and a
# demo has no business editing the machine's apt sources. apt itself still checks signatures and digests, so a
# half download is never used; an unpacked tree is moved into place only when it is whole.
#
# Sourced; expects $CACHE, say and die.

APT_DIR="$CACHE/apt"

# What apt believes is installed: the truth without QEMU and its companions. With them in the picture an installed
# package of one QEMU version would make the other one unresolvable; and they must land in the cache anyway. fio, which
# bench/compare installs, needs the same libraries: left in, it would be a broken package.
apt_status() {
    awk 'BEGIN { RS = ""; ORS = "\n\n" } !/^Package: (qemu|seabios|ipxe|fio|libpmem|libndctl|libdaxctl)/' \
        /var/lib/dpkg/status > "$APT_DIR/status"
}

apt_private() {
    local tool="$1"
    shift
    "$tool" -qq -o Dir::Etc::sourcelist="$APT_DIR/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::status="$APT_DIR/${APT_STATUS:-status}" -o Dir::State::lists="$APT_DIR/lists" -o Dir::Cache="$APT_DIR" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none \
        -o Acquire::Retries=2 -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@"
}

# Fetches the package lists: once a run at most, and only when something has to be downloaded.
apt_refresh() {
    [ -z "${APT_FRESH:-}" ] || return 0
    local key=/usr/share/keyrings/debian-archive-keyring.gpg
    local mirror="${BLKFERRY_MIRROR:-http://deb.debian.org}"
    [ -r "$key" ] || die "no $key: this machine is not a Debian. Install qemu-system-x86_64 yourself"
    mkdir -p "$APT_DIR/lists/partial" "$APT_DIR/archives/partial"
    {
        echo "deb [signed-by=$key] $mirror/debian bookworm main"
        echo "deb [signed-by=$key] $mirror/debian bookworm-updates main"
        echo "deb [signed-by=$key] $mirror/debian-security bookworm-security main"
        echo "deb [signed-by=$key] $mirror/debian bookworm-backports main"
    } > "$APT_DIR/sources.list"
    apt_status
    say "reading Debian's package lists"
    # A suite that is gone (backports after their end of life) is no error here: the fetch of it will be.
    apt_private apt-get update >> "$LOG" 2>&1 || say "some package lists could not be read: see $LOG"
    APT_FRESH=1
}

# unpack NAME FILE..: unpacks the packages into $CACHE/NAME, all or nothing.
unpack() {
    local name="$1" deb
    shift
    rm -rf "${CACHE:?}/$name.part"
    mkdir -p "$CACHE/$name.part"
    for deb in "$@"; do
        dpkg -x "$deb" "$CACHE/$name.part" || return 1
    done
    rm -rf "${CACHE:?}/$name"
    mv "$CACHE/$name.part" "$CACHE/$name"
}

# fetch_one NAME PACKAGE: one package, without what it depends on, as $CACHE/NAME.
fetch_one() {
    local name="$1" package="$2"
    [ ! -d "$CACHE/$name" ] || return 0
    apt_refresh
    say "fetching $package"
    rm -rf "$APT_DIR/one"
    mkdir -p "$APT_DIR/one"
    (cd "$APT_DIR/one" && apt_private apt-get download "$package") >> "$LOG" 2>&1 || return 1
    unpack "$name" "$APT_DIR"/one/*.deb
}

# fetch_closure NAME SUITE PACKAGE VERSION: a package and all that it needs and the machine lacks, as $CACHE/NAME.
fetch_closure() {
    local name="$1" suite="$2" package="$3" version="$4"
    [ ! -d "$CACHE/$name" ] || return 0
    apt_refresh
    say "fetching $package $version from $suite"
    rm -rf "$APT_DIR"/archives/*.deb
    apt_private apt-get install --download-only -y --no-install-recommends -t "$suite" "$package" >> "$LOG" 2>&1 ||
        return 1
    ls "$APT_DIR/archives/${package}_"*"${version}"*.deb > /dev/null 2>&1 || {
        say "$suite has no $package $version"
        return 1
    }
    unpack "$name" "$APT_DIR"/archives/*.deb
}

# fetch_alone NAME SUITE PACKAGE..: packages and all that they need down to the C library, as if this machine had
# nothing installed, as $CACHE/NAME: a tree that runs anywhere, also in a guest. What only people read is left out.
fetch_alone() {
    local name="$1" suite="$2"
    shift 2
    [ ! -d "$CACHE/$name" ] || return 0
    apt_refresh
    say "fetching $* from $suite, with all that they need"
    rm -rf "$APT_DIR"/archives/*.deb
    : > "$APT_DIR/nothing"
    APT_STATUS=nothing apt_private apt-get install --download-only -y --no-install-recommends -t "$suite" "$@" \
        >> "$LOG" 2>&1 || return 1
    unpack "$name.all" "$APT_DIR"/archives/*.deb || return 1
    rm -rf "$CACHE/$name.all/usr/share" "$APT_DIR"/archives/*.deb
    mv "$CACHE/$name.all" "$CACHE/$name"
}
