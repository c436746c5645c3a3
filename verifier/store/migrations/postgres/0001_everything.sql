-- compatible_from: 1
-- Times are microseconds since 1970 in UTC. Ids that are UUIDs are canonical text, which sorts by its bytes, as in SQLite.
-- Sealed blobs begin with a version (1 byte) and the id of their key (8 bytes): substr(blob, 2, 8).

CREATE TABLE mark (
  name  TEXT COLLATE "C" PRIMARY KEY,
  value BIGINT NOT NULL
);

INSERT INTO mark VALUES ('revision', 0);

-- What was frozen at begin, by its SHA-256: launches of one workload version on one generation share it.
CREATE TABLE terms (
  terms_id BYTEA PRIMARY KEY CHECK (length(terms_id) = 32),
  body     BYTEA NOT NULL
);

-- Verified chains (PDH, PEK, OCA, CEK), by their SHA-256.
CREATE TABLE platform (
  platform_id BYTEA PRIMARY KEY CHECK (length(platform_id) = 32),
  chain       BYTEA NOT NULL CHECK (length(chain) = 8336)
);

CREATE TABLE launch (
  launch_id        TEXT COLLATE "C" PRIMARY KEY,
  caller           TEXT COLLATE "C" NOT NULL,
  state            TEXT COLLATE "C" NOT NULL CHECK (state IN ('open', 'released', 'refused', 'abandoned', 'expired')),
  reason           TEXT COLLATE "C",
  workload         TEXT COLLATE "C" NOT NULL,
  workload_version TEXT COLLATE "C" NOT NULL,
  terms_id         BYTEA NOT NULL REFERENCES terms,
  platform_id      BYTEA NOT NULL REFERENCES platform,
  generation       TEXT COLLATE "C" NOT NULL,
  fingerprint      TEXT COLLATE "C" NOT NULL,
  policy           BIGINT NOT NULL,
  godh             BYTEA NOT NULL CHECK (length(godh) = 2084),
  session          BYTEA NOT NULL CHECK (length(session) = 128),
  pdh_fingerprint  BYTEA NOT NULL CHECK (length(pdh_fingerprint) = 32),
  tek              BYTEA,
  tik              BYTEA,
  create_time      BIGINT NOT NULL,
  expire_time      BIGINT NOT NULL,
  end_time         BIGINT,
  measurement      BYTEA CHECK (measurement IS NULL OR length(measurement) = 48),
  digest           BYTEA CHECK (digest IS NULL OR length(digest) = 32),
  packet_header    BYTEA,
  packet_payload   BYTEA,
  receipt          TEXT,
  generated        BYTEA,
  audit_id         TEXT COLLATE "C",
  grant_name       TEXT COLLATE "C",
  chip_id          TEXT COLLATE "C",
  oca              TEXT COLLATE "C" NOT NULL,
  firmware         TEXT COLLATE "C",
  -- Keys exist in an open launch and in no other; a packet exists in a released launch and in no other.
  CHECK ((state = 'open') = (tek IS NOT NULL)),
  CHECK ((tek IS NULL) = (tik IS NULL)),
  CHECK (state = 'released' OR (packet_header IS NULL AND packet_payload IS NULL AND receipt IS NULL)),
  CHECK ((state = 'open') = (end_time IS NULL))
);

CREATE INDEX launch_by_age ON launch (create_time, launch_id);
CREATE INDEX launch_by_grant ON launch (grant_name, create_time) WHERE grant_name IS NOT NULL;
CREATE INDEX launch_by_expiry ON launch (state, expire_time);
CREATE INDEX launch_open_by_caller ON launch (caller, expire_time) WHERE state = 'open';
CREATE INDEX launch_by_measurement ON launch (measurement) WHERE measurement IS NOT NULL;
CREATE INDEX launch_with_packet ON launch (end_time) WHERE packet_header IS NOT NULL;
CREATE INDEX launch_by_generated_key ON launch (substr(generated, 2, 8)) WHERE generated IS NOT NULL;

CREATE TABLE request (
  caller     TEXT COLLATE "C" NOT NULL,
  method     TEXT COLLATE "C" NOT NULL,
  request_id TEXT COLLATE "C" NOT NULL,
  content    BYTEA NOT NULL CHECK (length(content) = 32),
  -- Deferred: a request is written before its launch, so that a second one of the same id waits for the first.
  launch_id  TEXT COLLATE "C" NOT NULL REFERENCES launch DEFERRABLE INITIALLY DEFERRED,
  PRIMARY KEY (caller, method, request_id)
);

-- How far grants are spent, by their names. Rows stay when grants go.
CREATE TABLE ledger (
  grant_name TEXT COLLATE "C" PRIMARY KEY,
  open       BIGINT NOT NULL CHECK (open >= 0),
  released   BIGINT NOT NULL CHECK (released >= 0),
  refused    BIGINT NOT NULL CHECK (refused >= 0),
  rate_time  BIGINT NOT NULL
);

-- The oldest firmware that a PDH was used under.
CREATE TABLE pdh (
  pdh_fingerprint BYTEA PRIMARY KEY CHECK (length(pdh_fingerprint) = 32),
  api_major       BIGINT NOT NULL,
  api_minor       BIGINT NOT NULL,
  build           BIGINT NOT NULL
);

CREATE TABLE document (
  kind       TEXT COLLATE "C" NOT NULL,
  name       TEXT COLLATE "C" NOT NULL,
  version    TEXT COLLATE "C" NOT NULL,
  text       BYTEA NOT NULL,
  is_json    BIGINT NOT NULL CHECK (is_json IN (0, 1)),
  apply_time BIGINT NOT NULL,
  PRIMARY KEY (kind, name, version)
);

-- The last version of each secret's name; stays when the secret is erased, so that no version is used twice.
CREATE TABLE secret_name (
  name         TEXT COLLATE "C" PRIMARY KEY,
  last_version BIGINT NOT NULL
);

CREATE TABLE secret (
  name        TEXT COLLATE "C" NOT NULL REFERENCES secret_name,
  version     BIGINT NOT NULL,
  sealed      BYTEA NOT NULL,
  size        BIGINT NOT NULL,
  create_time BIGINT NOT NULL,
  PRIMARY KEY (name, version)
);

-- Keys of the verifier's own, sealed.
CREATE TABLE identity (
  name   TEXT COLLATE "C" PRIMARY KEY,
  sealed BYTEA NOT NULL
);

CREATE TABLE admin_request (
  caller     TEXT COLLATE "C" NOT NULL,
  method     TEXT COLLATE "C" NOT NULL,
  request_id TEXT COLLATE "C" NOT NULL,
  content    BYTEA NOT NULL CHECK (length(content) = 32),
  answer     TEXT NOT NULL,
  PRIMARY KEY (caller, method, request_id)
);

CREATE TABLE audit (
  number    BIGINT PRIMARY KEY,
  hash      BYTEA NOT NULL CHECK (length(hash) = 32),
  audit_id  TEXT COLLATE "C" NOT NULL UNIQUE,
  time      BIGINT NOT NULL,
  event     TEXT COLLATE "C" NOT NULL,
  launch_id TEXT COLLATE "C",
  caller    TEXT COLLATE "C",
  reason    TEXT COLLATE "C",
  body      TEXT NOT NULL
);

CREATE INDEX audit_by_launch ON audit (launch_id, number) WHERE launch_id IS NOT NULL;

-- The one row by which records get their numbers and hashes; `time` is the latest that any record carried.
CREATE TABLE audit_head (
  one    BIGINT PRIMARY KEY CHECK (one = 1),
  number BIGINT NOT NULL,
  hash   BYTEA NOT NULL CHECK (length(hash) = 32),
  time   BIGINT
);

INSERT INTO audit_head VALUES (1, 0, decode(repeat('00', 32), 'hex'), NULL);

CREATE TABLE checkpoint (
  number BIGINT PRIMARY KEY,
  token  TEXT NOT NULL
);

-- Records are only ever added.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION '% rows are neither changed nor removed', TG_TABLE_NAME; END $$;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_is_not_emptied BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER checkpoint_is_not_changed BEFORE UPDATE OR DELETE ON checkpoint FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER checkpoint_is_not_emptied BEFORE TRUNCATE ON checkpoint FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
