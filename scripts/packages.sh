# shellcheck shell=bash
# packages.sh: Debian's packages, for guest and test, which source this.

# missing PACKAGE...: those that are not installed.
missing() {
	comm -13 <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^installed //p' | sort) \
		<(printf '%s\n' "$@" | sort)
}

# apt ARGUMENT...: apt-get, which says something only if it fails. It is tried again for as long as
# somebody else has a lock, as the daily update of a machine that has just been started does: apt-get
# can wait for dpkg's lock by itself, but not for those of its lists and downloads.
apt() {
	local tries said
	for ((tries = 0; ; tries++)); do
		said=$(LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=300 "$@" 2>&1) && return
		[[ $said == *'Could not get lock'* && $tries -lt 60 ]] || break
		sleep 5
	done
	tail -n 20 <<<"$said" >&2
	return 1
}

# install_missing PACKAGE...
install_missing() {
	local packages
	mapfile -t packages < <(missing "$@")
	[[ ${#packages[@]} != 0 ]] || return 0
	apt update
	apt install --no-install-recommends "${packages[@]}"
}
