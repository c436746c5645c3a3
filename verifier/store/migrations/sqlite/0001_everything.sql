-- compatible_from: 1
-- Times are microseconds since 1970 in UTC. Ids that are UUIDs are canonical text. Sealed blobs begin with a version
-- (1 byte) and the id of their key (8 bytes): substr(blob, 2, 8).

CREATE TABLE mark (
  name  TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO mark VALUES ('revision', 0);

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

-- With a rowid: rows are long, and their ids random; so new ones stand together.
CREATE TABLE launch (
  launch_id        TEXT NOT NULL PRIMARY KEY,
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
  grant_name       TEXT,
  chip_id          TEXT,
  oca              TEXT NOT NULL,
  firmware         TEXT,
  -- Keys exist in an open launch and in no other; a packet exists in a released launch and in no other.
  CHECK ((state = 'open') = (tek IS NOT NULL)),
  CHECK ((tek IS NULL) = (tik IS NULL)),
  CHECK (state = 'released' OR (packet_header IS NULL AND packet_payload IS NULL AND receipt IS NULL)),
  CHECK ((state = 'open') = (end_time IS NULL))
) STRICT;

CREATE INDEX launch_by_age ON launch (create_time, launch_id);
CREATE INDEX launch_by_grant ON launch (grant_name, create_time) WHERE grant_name IS NOT NULL;
CREATE INDEX launch_by_expiry ON launch (state, expire_time);
CREATE INDEX launch_open_by_caller ON launch (caller, expire_time) WHERE state = 'open';
CREATE INDEX launch_by_measurement ON launch (measurement) WHERE measurement IS NOT NULL;
CREATE INDEX launch_with_packet ON launch (end_time) WHERE packet_header IS NOT NULL;
CREATE INDEX launch_by_generated_key ON launch (substr(generated, 2, 8)) WHERE generated IS NOT NULL;

CREATE TABLE request (
  caller     TEXT NOT NULL,
  method     TEXT NOT NULL,
  request_id TEXT NOT NULL,
  content    BLOB NOT NULL CHECK (length(content) = 32),
  -- No REFERENCES: a request is written before its launch, and SQLite would look for it among all requests then.
  launch_id  TEXT NOT NULL,
  PRIMARY KEY (caller, method, request_id)
) STRICT, WITHOUT ROWID;

-- How far grants are spent, by their names. Rows stay when grants go.
CREATE TABLE ledger (
  grant_name TEXT PRIMARY KEY,
  open       INTEGER NOT NULL CHECK (open >= 0),
  released   INTEGER NOT NULL CHECK (released >= 0),
  refused    INTEGER NOT NULL CHECK (refused >= 0),
  rate_time  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The oldest firmware that a PDH was used under.
CREATE TABLE pdh (
  pdh_fingerprint BLOB PRIMARY KEY CHECK (length(pdh_fingerprint) = 32),
  api_major       INTEGER NOT NULL,
  api_minor       INTEGER NOT NULL,
  build           INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE document (
  kind       TEXT NOT NULL,
  name       TEXT NOT NULL,
  version    TEXT NOT NULL,
  text       BLOB NOT NULL,
  is_json    INTEGER NOT NULL CHECK (is_json IN (0, 1)),
  apply_time INTEGER NOT NULL,
  PRIMARY KEY (kind, name, version)
) STRICT, WITHOUT ROWID;

-- The last version of each secret's name; stays when the secret is erased, so that no version is used twice.
CREATE TABLE secret_name (
  name         TEXT PRIMARY KEY,
  last_version INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE secret (
  name        TEXT NOT NULL REFERENCES secret_name,
  version     INTEGER NOT NULL,
  sealed      BLOB NOT NULL,
  size        INTEGER NOT NULL,
  create_time INTEGER NOT NULL,
  PRIMARY KEY (name, version)
) STRICT, WITHOUT ROWID;

-- Keys of the verifier's own, sealed.
CREATE TABLE identity (
  name   TEXT PRIMARY KEY,
  sealed BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE admin_request (
  caller     TEXT NOT NULL,
  method     TEXT NOT NULL,
  request_id TEXT NOT NULL,
  content    BLOB NOT NULL CHECK (length(content) = 32),
  answer     TEXT NOT NULL,
  PRIMARY KEY (caller, method, request_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
  number    INTEGER PRIMARY KEY,
  hash      BLOB NOT NULL CHECK (length(hash) = 32),
  audit_id  TEXT NOT NULL UNIQUE,
  time      INTEGER NOT NULL,
  event     TEXT NOT NULL,
  launch_id TEXT,
  caller    TEXT,
  reason    TEXT,
  body      TEXT NOT NULL
) STRICT;

CREATE INDEX audit_by_launch ON audit (launch_id, number) WHERE launch_id IS NOT NULL;

-- The one row by which records get their numbers and hashes; `time` is the latest that any record carried.
CREATE TABLE audit_head (
  one    INTEGER PRIMARY KEY CHECK (one = 1),
  number INTEGER NOT NULL,
  hash   BLOB NOT NULL CHECK (length(hash) = 32),
  time   INTEGER
) STRICT;

INSERT INTO audit_head VALUES (1, 0, zeroblob(32), NULL);

CREATE TABLE checkpoint (
  number INTEGER PRIMARY KEY,
  token  TEXT NOT NULL
) STRICT;

-- Launches end and stay; here a request does not hold its launch.
CREATE TRIGGER launch_is_not_removed BEFORE DELETE ON launch BEGIN SELECT raise(ABORT, 'launches are not removed'); END;

-- Records are only ever added.
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN SELECT raise(ABORT, 'audit records are not changed'); END;
CREATE TRIGGER audit_is_not_removed BEFORE DELETE ON audit BEGIN SELECT raise(ABORT, 'audit records are not removed'); END;
CREATE TRIGGER checkpoint_is_not_changed BEFORE UPDATE ON checkpoint BEGIN SELECT raise(ABORT, 'checkpoints are not changed'); END;
CREATE TRIGGER checkpoint_is_not_removed BEFORE DELETE ON checkpoint BEGIN SELECT raise(ABORT, 'checkpoints are not removed'); END;
