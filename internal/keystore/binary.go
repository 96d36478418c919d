package keystore

import (
	"context"
	"encoding/binary"
)

// parameter of a statement, in Postgres's binary format.
type parameter struct {
	oid   uint32
	value []byte
}

// Types of parameters, as pg_type numbers them.
const (
	bigintOID           = 20
	textOID             = 25
	timestamptzOID      = 1184
	bigintArrayOID      = 1016
	textArrayOID        = 1009
	timestamptzArrayOID = 1185
)

// epoch is where Postgres counts from: the year 2000, in microseconds since 1970.
const epoch = 946_684_800_000_000

// execBinary runs one statement with parameters that are encoded already. pgx makes an interface value of each element of an
// array, which for long arrays costs several times what their encoding does.
func (s *Store) execBinary(ctx context.Context, sql string, parameters ...parameter) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	values, oids := make([][]byte, len(parameters)), make([]uint32, len(parameters))
	for i, p := range parameters {
		values[i], oids[i] = p.value, p.oid
	}
	const binaryFormat = 1
	return conn.Conn().PgConn().ExecParams(ctx, sql, values, oids, []int16{binaryFormat}, nil).Read().Err
}

func text(s string) parameter { return parameter{textOID, []byte(s)} }

func bigint(n int64) parameter {
	return parameter{bigintOID, binary.BigEndian.AppendUint64(nil, uint64(n))}
}

// timestamptz takes microseconds since 1970.
func timestamptz(micros int64) parameter {
	return parameter{timestamptzOID, binary.BigEndian.AppendUint64(nil, uint64(micros-epoch))}
}

// array is a one-dimensional array in the making.
type array struct {
	oid    uint32 // of the array
	value  []byte // the header, to be completed, and the elements
	length uint32
}

// Header of an array: dimensions, whether it has nulls, type of the elements, length, first index.
const arrayHeader = 5 * 4

// newArray makes room for that many bytes of elements.
func newArray(oid, elementOID uint32, room int) *array {
	a := &array{oid: oid, value: make([]byte, arrayHeader, arrayHeader+room)}
	binary.BigEndian.PutUint32(a.value, 1)
	binary.BigEndian.PutUint32(a.value[8:], elementOID)
	binary.BigEndian.PutUint32(a.value[16:], 1)
	return a
}

func (a *array) addText(s string) {
	a.value = append(binary.BigEndian.AppendUint32(a.value, uint32(len(s))), s...)
	a.length++
}

func (a *array) addBigint(n int64) {
	a.value = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(a.value, 8), uint64(n))
	a.length++
}

func (a *array) addTimestamptz(micros int64) { a.addBigint(micros - epoch) }

func (a *array) parameter() parameter {
	binary.BigEndian.PutUint32(a.value[12:], a.length)
	return parameter{a.oid, a.value}
}
