"""linux/psp-sev.h: the request on /dev/sev and the struct of each command. All of them are packed. Pure.

The command's numbers are `common.sev.abi.DeviceCommand`.
"""

from __future__ import annotations

import struct

SEV_ISSUE_CMD = 0xC0105300  # _IOWR('S', 0, struct sev_issue_cmd)

ISSUE_CMD = struct.Struct("<IQI")  # cmd, data, error
STATUS_SIZE = 12  # struct sev_user_data_status
PEK_CSR = struct.Struct("<QI")  # address, length
PDH_CERT_EXPORT = struct.Struct("<QIQI")  # PDH's address and length, chain's address and length
PEK_CERT_IMPORT = struct.Struct("<QIQI")  # PEK's address and length, OCA's address and length
GET_ID_SIZE = 128  # struct sev_user_data_get_id: two sockets
GET_ID2 = struct.Struct("<QI")  # address, length
