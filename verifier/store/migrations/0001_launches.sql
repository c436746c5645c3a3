-- Times are microseconds since 1970 in UTC. Ids that are UUIDs are canonical text.

CREATE TABLE mark (
  name  TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What was frozen at begin, by its SHA-256: launches of one workload version on one generation share it.
CREATE TABLE terms (
  terms_id BLOB PRIMARY KEY CHECK (length(terms_id) = 32),
  body     BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- Verified chains (PDH, PEK, OCA, CEK), by their SHA-256.
CREATE TABLE platform (
  platform_id BLOB PRIMARY KEY CHECK (length(platform_id) = 32),
  chain       BLOB NOT NULL CHECK (length(chain) = 8336)
) STRICT;

CREATE TABLE launch (
  launch_id        TEXT PRIMARY KEY,
  caller           TEXT NOT NULL,
  state            TEXT NOT NULL CHECK (state IN ('open', 'released', 'refused', 'abandoned', 'expired')),
  reason           TEXT,
  workload         TEXT NOT NULL,
  workload_version TEXT NOT NULL,
  terms_id         BLOB NOT NULL REFERENCES terms,
  platform_id      BLOB NOT NULL REFERENCES platform,
  generation       TEXT NOT NULL,
  fingerprint      TEXT NOT NULL,
  policy           INTEGER NOT NULL,
  godh             BLOB NOT NULL CHECK (length(godh) = 2084),
  session          BLOB NOT NULL CHECK (length(session) = 128),
  pdh_fingerprint  BLOB NOT NULL CHECK (length(pdh_fingerprint) = 32),
  key_id           BLOB,
  tek              BLOB,
  tik              BLOB,
  create_time      INTEGER NOT NULL,
  expire_time      INTEGER NOT NULL,
  end_time         INTEGER,
  measurement      BLOB CHECK (measurement IS NULL OR length(measurement) = 48),
  digest           BLOB CHECK (digest IS NULL OR length(digest) = 32),
  packet_header    BLOB,
  packet_payload   BLOB,
  receipt          TEXT,
  generated        BLOB,
  audit_id         TEXT,
  -- Keys exist in an open launch and in no other; a packet exists in a released launch and in no other.
  CHECK ((state = 'open') = (tek IS NOT NULL)),
  CHECK ((tek IS NULL) = (tik IS NULL) AND (tek IS NULL) = (key_id IS NULL)),
  CHECK (state = 'released' OR (packet_header IS NULL AND packet_payload IS NULL AND receipt IS NULL)),
  CHECK ((state = 'open') = (end_time IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX launch_open_by_expiry ON launch (expire_time) WHERE state = 'open';
CREATE INDEX launch_open_by_caller ON launch (caller, expire_time) WHERE state = 'open';
CREATE INDEX launch_by_measurement ON launch (measurement) WHERE measurement IS NOT NULL;
CREATE INDEX launch_with_packet ON launch (end_time) WHERE packet_header IS NOT NULL;

CREATE TABLE request (
  caller     TEXT NOT NULL,
  method     TEXT NOT NULL,
  request_id TEXT NOT NULL,
  content    BLOB NOT NULL CHECK (length(content) = 32),
  launch_id  TEXT NOT NULL REFERENCES launch,
  PRIMARY KEY (caller, method, request_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
  number    INTEGER PRIMARY KEY AUTOINCREMENT,
  audit_id  TEXT NOT NULL UNIQUE,
  time      INTEGER NOT NULL,
  event     TEXT NOT NULL,
  launch_id TEXT,
  caller    TEXT,
  reason    TEXT,
  body      TEXT NOT NULL
) STRICT;

CREATE INDEX audit_by_launch ON audit (launch_id, number) WHERE launch_id IS NOT NULL;

-- Records are only ever added.
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN SELECT raise(ABORT, 'audit records are not changed'); END;
CREATE TRIGGER audit_is_not_removed BEFORE DELETE ON audit BEGIN SELECT raise(ABORT, 'audit records are not removed'); END;
