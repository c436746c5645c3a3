// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The half of Linux's efi_secret that cannot be built as a module.
 *
 * With CONFIG_EFI_COCO_SECRET the kernel notes, early, where firmware says that the secret area is, and registers the
 * platform device that the driver efi_secret binds to. No Debian kernel has that option. This module does both later,
 * so that Debian's own efi_secret.c, built as it is, shows the secrets of a stock kernel's guest as files.
 *
 * The address of the configuration table is a parameter, because the kernel exports it to nobody but readers of
 * /sys/firmware/efi/config_table.
 */

#include <linux/efi.h>
#include <linux/err.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/platform_device.h>

/* The table's length is not to be had either; firmware has a dozen entries. */
#define ENTRIES_MAX 128

static ulong config_table;
module_param(config_table, ulong, 0);
MODULE_PARM_DESC(config_table, "what /sys/firmware/efi/config_table says");

static struct platform_device *device;

static int __init efi_secret_device_init(void)
{
	const efi_guid_t wanted = LINUX_EFI_COCO_SECRET_AREA_GUID;
	phys_addr_t at = config_table;
	int i;

	if (!config_table)
		return -EINVAL;
	for (i = 0; i < ENTRIES_MAX; i++, at += sizeof(efi_config_table_64_t)) {
		/* One by one: what follows the table may be memory of another kind, which cannot be mapped along. */
		efi_config_table_64_t *entry = memremap(at, sizeof(*entry), MEMREMAP_WB);
		bool found;

		if (!entry)
			return -ENODEV;
		found = !efi_guidcmp(entry->guid, wanted);
		if (found)
			efi.coco_secret = entry->table;
		memunmap(entry);
		if (found) {
			device = platform_device_register_simple("efi_secret", PLATFORM_DEVID_NONE, NULL, 0);
			return PTR_ERR_OR_ZERO(device);
		}
	}
	return -ENODEV;
}

static void __exit efi_secret_device_exit(void)
{
	platform_device_unregister(device);
}

module_init(efi_secret_device_init);
module_exit(efi_secret_device_exit);

MODULE_DESCRIPTION("Device for the driver efi_secret on kernels without CONFIG_EFI_COCO_SECRET");
MODULE_LICENSE("GPL");
