# How the guest finds and reads its secrets in physical memory, for a kernel without the driver efi_secret.
#
# Firmware puts into its configuration table an entry that points to {u64 base, u64 size} of the secret area (edk2,
# OvmfPkg/AmdSev/SecretDxe). The area holds a table of {GUID, u32 length, data}, lengths including their own 20 bytes.
# The rules are those of Linux's efi_secret: one impossible length, and nothing at all is shown.
#
# Everything is done on hexadecimal text, two digits a byte, because a shell cannot hold a NUL; no process is started
# for a byte or an entry, because under emulation each costs milliseconds. Needs ${text:offset:length}, which busybox
# and bash have.

config_entry_guid=ad56f9ad8ce94c48ae11b51c7d336447 # adf956ad-e98c-484c-ae11-b51c7d336447 as it stands in memory
secret_table_guid=42f5741edd71664d963eef4287ff173b # 1e74f542-71dd-4d66-963e-ef4287ff173b
deleted_guid=00000000000000000000000000000000
config_table_max=3072 # bytes, 128 entries; firmware has a dozen, and nothing tells this program how many
files_max=64          # EFI_SECRET_NUM_FILES

# hex_of: standard input in hexadecimal.
hex_of() {
    od -An -v -tx1 | tr -d ' \n'
}

# hex_at MEMORY ADDRESS SIZE [BLOCK]: what is there, in hexadecimal, up to the first block that cannot be read.
hex_at() {
    dd if="$1" bs="${4:-4096}" skip="$2" count="$3" iflag=skip_bytes,count_bytes,fullblock 2>/dev/null | hex_of
}

# set_number HEX: sets `number` to a little-endian number of up to eight bytes.
set_number() {
    digits=
    rest=$1
    while [ -n "$rest" ]; do
        digits=${rest:0:2}$digits
        rest=${rest:2}
    done
    number=$((0x${digits:-0}))
}

# set_guid HEX: sets `guid` to the usual form of 16 bytes, whose first three fields are little-endian.
set_guid() {
    guid=${1:6:2}${1:4:2}${1:2:2}${1:0:2}-${1:10:2}${1:8:2}-${1:14:2}${1:12:2}-${1:16:4}-${1:20:12}
}

# read_secrets MEMORY CONFIG_TABLE: the lines about all secrets.
# MEMORY is /dev/mem; CONFIG_TABLE is the file in which the kernel tells the address of firmware's configuration table.
read_secrets() {
    if ! [ -r "$2" ]; then
        echo "no secret area" # not started by UEFI firmware
        return
    fi
    entries=$(hex_at "$1" "$(($(cat "$2")))" $config_table_max 24)
    if [ -z "$entries" ]; then
        echo "secret area cannot be read"
        return
    fi
    at=0
    while [ "${entries:$at:32}" != $config_entry_guid ]; do
        at=$((at + 48))
        if [ $at -ge ${#entries} ]; then
            echo "no secret area"
            return
        fi
    done
    set_number "${entries:$((at + 32)):16}"
    pointer=$(hex_at "$1" "$number" 16)
    if [ ${#pointer} -ne 32 ]; then
        echo "secret area cannot be read" # the kernel wants iomem=relaxed
        return
    fi
    set_number "${pointer:0:16}"
    base=$number
    set_number "${pointer:16}"
    show_area "$1" "$base" "$number"
}

# show_area MEMORY BASE SIZE: the lines about the secrets in the area there.
show_area() {
    if [ "$2" -eq 0 ] || [ "$3" -eq 0 ]; then
        echo "no secret area"
        return
    fi
    area=$(hex_at "$1" "$2" "$3")
    if [ ${#area} -ne $(($3 * 2)) ]; then
        echo "secret area cannot be read"
        return
    fi
    if [ "${area:0:32}" != $secret_table_guid ] || [ "$3" -lt 20 ]; then
        echo "no secret area"
        return
    fi
    set_number "${area:32:8}"
    length=$number
    if [ "$length" -lt 20 ] || [ "$length" -gt "$3" ]; then
        echo "secret area is corrupted"
        return
    fi
    lines=
    files=0
    at=20
    while [ $((length - at)) -ge 20 ] && [ $files -lt $files_max ]; do
        name=${area:$((at * 2)):32}
        set_number "${area:$((at * 2 + 32)):8}"
        if [ "$number" -lt 20 ] || [ "$number" -gt $((length - at)) ]; then
            echo "secret area is corrupted" # and nothing of what came before is shown
            return
        fi
        if [ "$name" != $deleted_guid ]; then
            set_guid "$name"
            lines="${lines}secret $guid $((number - 20)) ${area:$((at * 2 + 40)):$(((number - 20) * 2))}
"
            files=$((files + 1))
        fi
        at=$((at + number))
    done
    printf '%s' "$lines"
}

# read_secret_files FOLDER: the same lines from the files that efi_secret shows, in the order of their names.
read_secret_files() {
    for file in "$1"/*; do
        [ -e "$file" ] || continue
        data=$(hex_of <"$file")
        echo "secret ${file##*/} $((${#data} / 2)) $data"
    done
}

# set_secret LINES GUID: sets `secret` to the data of one secret among the lines, in hexadecimal; 1 if it is not there.
set_secret() {
    case "
$1" in
        *"
secret $2 "*) ;;
        *) return 1 ;;
    esac
    secret=${1#*"secret $2 "}
    secret=${secret%%"
"*}
    secret=${secret#* }
}
